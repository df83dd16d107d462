// Sums over the elements of a tensor, in double, along a tree that depends on the tensor's size alone: so the result has the
// same bits for every instruction set, any number of threads, and every way to cut the work.
//
//   leaf    up to 1,024 elements: 32 lanes add every 32nd element in order, then lane i and lane i + 16, i + 8, ..., i + 1
//   block   16 leaves, added in order; where rows matter, the leaves of a group of rows
//   tensor  256 blocks, in order; then those sums, in order
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

  // What stands in slot `slot` of the sum, where a and b stand in it.
  GRADSTEP_HD static double added(int slot, double a, double b) {
    if (slot != kMaxAbs) return a + b;
    return a >= b || a != a ? a : b;
  }
  GRADSTEP_HD void add(const Sums& other) {
    for (int slot = 0; slot < kSums; ++slot) at[slot] = added(slot, at[slot], other.at[slot]);
  }
};

inline constexpr std::int64_t kBlocksTogether = 256;

// The sums of a tensor, from those of its blocks.
inline Sums sum_blocks(const Sums* blocks, std::int64_t n) {
  Sums total;
  for (std::int64_t first = 0; first < n; first += kBlocksTogether) {
    Sums some;
    for (std::int64_t i = first; i < n && i < first + kBlocksTogether; ++i) some.add(blocks[i]);
    total.add(some);
  }
  return total;
}

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

// The end of a leaf's sum.
GRADSTEP_HD double sum_of_eight(const double* x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

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
  return sum_of_eight(eight);
}

// The same of a leaf of up to eight elements: a row, of which there are many.
template <Term kTerm, class T>
GRADSTEP_HD double short_leaf_sum(std::int64_t size, const Addend<T> x) {
  double eight[8] = {};
  for (std::int64_t i = 0; i < size; ++i) {
    const double element = static_cast<double>(x.scale * x.at[i]);
    eight[i] += kTerm == Term::kElement ? element : element * element;
  }
  return sum_of_eight(eight);
}

// Adds the leaves of `size` elements to `sum`, in order. Leaves begin anew with each row.
template <Term kTerm, class T>
GRADSTEP_HD void add_leaves(double& sum, std::int64_t size, std::int64_t row, const Addend<T> x) {
  const std::int64_t longest = row < kTile ? row : kTile;
  for (std::int64_t leaf = 0; leaf < size; leaf += longest) {
    sum += leaf_sum<kTerm>(size - leaf < longest ? size - leaf : longest, Addend<T>{x.at + leaf, x.scale, x.ahead});
  }
}

}  // namespace gradstep
