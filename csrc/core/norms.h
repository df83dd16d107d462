// Sums over the elements of a tensor, in double, along a tree that depends on the tensor's size alone: so the result has the
// same bits for every instruction set, any number of threads, and every way to cut the work.
//
//   leaf    up to 1,024 elements: 32 lanes add every 32nd element in order, then lane i and lane i + 16, i + 8, ..., i + 1
//   block   16 leaves, added in order; where rows matter, the leaves of a group of rows
//   tensor  the blocks, in order
#pragma once

#include "sweep.h"

namespace gradstep {

// What a sweep can sum up, a slot each. All are added but the last, which is a maximum.
enum Sum {
  kCameSquares,     // of the gradient as it came, scaled
  kGradSquares,     // of the gradient where norms are taken for clipping
  kParamSquares,    // of the parameter before the update
  kUpdateSquares,   // of the update
  kRuleGradSquares,  // of the gradient as the rule gets it
  kAgreeing,        // elements whose update has the sign of the gradient
  kNans,            // of the gradient, as it came
  kInfs,
  kZeros,
  kMaxAbs,
  kSums
};

struct Sums {
  double at[kSums] = {};

  void add(const Sums& other) {
    for (int k = 0; k < kMaxAbs; ++k) at[k] += other.at[k];
    const double a = at[kMaxAbs], b = other.at[kMaxAbs];
    at[kMaxAbs] = a >= b || a != a ? a : b;
  }
};

// Sums by row.
enum RowSum { kRowGradSquares, kRowGrad, kRowParamSquares, kRowSums };

// Adds up, over a leaf, the terms that `terms(lanes of each operand...)` makes of elements: an array of Lanes, a sum each.
// Terms of zeros must be zero: a leaf is filled up with them.
template <int kTerms, class Terms, class... Operand>
GRADSTEP_HD void add_leaf(double* const (&to)[kTerms], std::int64_t size, const Terms terms, const Operand*... operands) {
  constexpr int kLanes = 32, kParts = 4;
  Lanes sums[kParts][kTerms] = {};
  const auto add = [&](std::int64_t i, const auto*... at) GRADSTEP_INLINE_LAMBDA {
    for (int part = 0; part < kParts; ++part) terms(sums[part], load_lanes(at + i + 8 * part)...);
  };
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) add(i, operands...);
  if (i < size) {
    const auto rest = [&](auto... filled) GRADSTEP_INLINE_LAMBDA { add(0, filled.at...); };
    const auto fill = [&]<class T>(const T* from) GRADSTEP_INLINE_LAMBDA {
      struct {
        alignas(64) T at[kLanes];
      } filled{};
      for (std::int64_t j = i; j < size; ++j) filled.at[j - i] = from[j];
      return filled;
    };
    rest(fill(operands)...);
  }
  for (int k = 0; k < kTerms; ++k) {
    const Lanes eight = (sums[0][k] + sums[2][k]) + (sums[1][k] + sums[3][k]);
    const double four[] = {eight[0] + eight[4], eight[1] + eight[5], eight[2] + eight[6], eight[3] + eight[7]};
    *to[k] += (four[0] + four[2]) + (four[1] + four[3]);
  }
}

}  // namespace gradstep
