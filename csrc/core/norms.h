// Sums over the elements of a tensor, in double, along a tree that depends on the tensor's size alone: so the result has the
// same bits for every instruction set, any number of threads, and every way to cut the work.
//
//   leaf    up to 1,024 elements: 32 lanes add every 32nd element in order, then lane i and lane i + 16, i + 8, ..., i + 1
//   block   16 leaves, added in order; where rows matter, the leaves of a group of rows
//   tensor  the blocks, in order
#pragma once

#include <utility>

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

// What is added up: elements, or their squares.
enum class Term { kElement, kSquare };

// Elements on their way into a sum: each is multiplied by `scale` first. `ahead`: how many elements ahead memory is asked for
// them, 0 if they are in the caches.
template <class T>
struct Addend {
  const T* at;
  T scale = T(1);
  std::int64_t ahead = 0;
};

template <Term kTerm, class T>
GRADSTEP_HD Doubles add_term(Doubles sum, Doubles x) {
  if constexpr (kTerm == Term::kElement) return sum + x;
  else if constexpr (sizeof(T) == sizeof(float)) return add_exact_square(sum, x);
  else return sum + x * x;
}

// The sum of one leaf.
template <Term kTerm, class T>
GRADSTEP_HD double leaf_sum(std::int64_t size, const Addend<T> x) {
  // As many vectors at a time as there are registers for; where all lanes do not fit, the leaf, which is in the L1 cache by
  // then, is read twice.
  constexpr int kLanes = 32, kVectors = kLanes / kVectorDoubles, kTogether = kVectors < 8 ? kVectors : 8;
  const std::int64_t whole = size / kLanes * kLanes;
  alignas(64) T rest[kLanes] = {};
  for (std::int64_t i = whole; i < size; ++i) rest[i - whole] = x.at[i];

  Doubles sums[kVectors];
  for (int first = 0; first < kVectors; first += kTogether) {
    const std::int64_t ahead = first == 0 ? x.ahead : 0;
    [&]<std::size_t... k>(std::index_sequence<k...>) GRADSTEP_INLINE_LAMBDA {
      Doubles some[kTogether] = {};
      const auto add = [&](const T* at) GRADSTEP_INLINE_LAMBDA {
        ((some[k] = add_term<kTerm, T>(some[k], load_doubles(at + (first + static_cast<int>(k)) * kVectorDoubles, x.scale))),
         ...);
      };
      for (std::int64_t i = 0; i < whole; i += kLanes) {
        if (ahead) prefetch<kLanes * sizeof(T)>(x.at + i + ahead);
        add(x.at + i);
      }
      if (whole < size) add(rest);
      ((sums[first + static_cast<int>(k)] = some[k]), ...);
    }(std::make_index_sequence<kTogether>());
  }
  for (int left = kVectors / 2; left * kVectorDoubles >= 8; left /= 2) {
    for (int k = 0; k < left; ++k) sums[k] = sums[k] + sums[k + left];
  }
  double eight[8];
  std::memcpy(eight, sums, sizeof eight);
  const double four[] = {eight[0] + eight[4], eight[1] + eight[5], eight[2] + eight[6], eight[3] + eight[7]};
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// Adds the leaves of `size` elements to `sum`, in order.
template <Term kTerm, class T>
GRADSTEP_HD void add_leaves(double& sum, std::int64_t size, const Addend<T> x) {
  for (std::int64_t leaf = 0; leaf < size; leaf += kTile) {
    sum += leaf_sum<kTerm>(size - leaf < kTile ? size - leaf : kTile, Addend<T>{x.at + leaf, x.scale, x.ahead});
  }
}

}  // namespace gradstep
