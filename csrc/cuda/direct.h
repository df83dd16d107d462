// The programs for what most steps are: operands that are contiguous, and nothing between gradient and parameter but factors
// and the rule. Elements stay in registers.
#pragma once

#include <utility>

#include "access.h"

namespace gradstep::cuda {

// The squares of the gradient of one block, leaf by leaf.
template <class T, class Threads>
GRADSTEP_PROGRAM void sum_gradient(const Threads& threads, const Args& args, std::uint32_t chunk) {
  const auto [i, block] = args.chunks[chunk];
  const Item& item = args.items[i];
  const Sweep& sweep = item.sweep;
  const T scale = T(args.pipelines[i].scale);
  const Operand& gradient = sweep.operands[1];
  auto* leaves = reinterpret_cast<double*>(threads.shared());
  const std::int64_t begin = std::int64_t{block} * kSumBlock, left = sweep.size - begin;
  const std::int64_t size = left < kSumBlock ? left : kSumBlock, n_leaves = (size + kTile - 1) / kTile;
  visit_format(gradient.format, [&]<class F>() {
    const auto* g = reinterpret_cast<const typename F::Stored*>(gradient.data) + begin;
    for (std::int64_t leaf = threads.warp(); leaf < n_leaves; leaf += threads.n_warps()) {
      const auto* from = g + leaf * kTile;
      const auto length = static_cast<std::uint32_t>(size - leaf * kTile < kTile ? size - leaf * kTile : kTile);
      const double sum = threads.template leaf_sum<Term::kSquare, T>(
          length, [&](std::uint32_t k) { return scale * flushed(F::template decode<T>(from[k])); });
      if (threads.lane() == 0) leaves[leaf] = sum;
    }
  });
  threads.sync();
  if (threads.first() != 0) return;
  Sums sums;
  for (std::int64_t leaf = 0; leaf < n_leaves; ++leaf) sums.at[kGradSquares] += leaves[leaf];
  args.blocks[item.first_block + block] = sums;
}

// Straight to the parameter. `kStored`: whether all operands are of the type that the rule computes in.
template <class Rule, class T, Stored kStored>
class DirectUpdate {
 public:
  GRADSTEP_HD DirectUpdate(const Sweep& sweep, const Pipeline& pipeline, const Factors& factors)
      : scale_(T(pipeline.scale)), factor_(T(factors.gradient)), decayed_(T(factors.decayed)), trust_(T(factors.trust)) {
    GRADSTEP_UNROLL() for (int k = 0; k < kOperands; ++k) {
      data_[k] = sweep.operands[k].data;
      formats_[k] = sweep.operands[k].format;
    }
  }

  // Whether `kWide` elements of every operand, from `begin` on, can be taken in one access.
  GRADSTEP_HD bool is_aligned(std::int64_t begin) const {
    bool aligned = true;
    GRADSTEP_UNROLL() for (int k = 0; k < kOperands; ++k) {
      const int item = bits(k) / 8, wide = item * kWide < 16 ? item * kWide : 16;
      aligned = aligned && reinterpret_cast<std::uintptr_t>(data_[k] + begin * item) % static_cast<std::uintptr_t>(wide) == 0;
    }
    return aligned;
  }

  // Elements [i, i + kWidth).
  template <int kWidth>
  GRADSTEP_HD void step(std::int64_t i, const RuleOperators<Rule, T>& rule) const {
    Raw<kWidth, std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>> raw[kOperands];
    T x[kOperands][kWidth];
    GRADSTEP_UNROLL() for (int k = 0; k < kOperands; ++k) raw[k].read(data_[k], i, bits(k));
    GRADSTEP_UNROLL() for (int k = 0; k < kOperands; ++k) raw[k].decode(format(k), x[k]);
    GRADSTEP_UNROLL() for (int e = 0; e < kWidth; ++e) {
      [&]<std::size_t... s>(std::index_sequence<s...>) {
        T& p = x[0][e];
        const T g = rule.gradient(scaled_gradient(x[1][e], scale_, factor_), p, decayed_);
        p = p - trust_ * rule.total(rule.update(p, g, x[2 + s][e]...), p);
      }(std::make_index_sequence<Rule::states.size()>());
    }
    GRADSTEP_UNROLL() for (int k = 0; k < kOperands; ++k) {
      if (k == 1) continue;
      raw[k].encode(format(k), x[k]);
      raw[k].write(data_[k], i, bits(k));
    }
  }

  static constexpr int kWide = 4;

 private:
  static constexpr int kOperands = 2 + static_cast<int>(Rule::states.size());

  GRADSTEP_HD Format format(int k) const {
    if constexpr (kStored == Stored::kMixed) return formats_[k];
    else return sizeof(T) == sizeof(float) ? Format::kFloat32 : Format::kFloat64;
  }
  GRADSTEP_HD int bits(int k) const { return gradstep::bits_of(format(k)); }

  std::byte* data_[kOperands];
  Format formats_[kOperands];
  T scale_, factor_, decayed_, trust_;
};

template <class Rule, class T, Stored kStored, class Threads>
GRADSTEP_PROGRAM void update_directly(const Threads& threads, const Args& args, std::uint32_t chunk) {
  const auto [i, block] = args.chunks[chunk];
  const Sweep& sweep = args.items[i].sweep;
  const Pipeline& pipeline = args.pipelines[i];
  if (pipeline.n_passes == 0) return;  // the step is left out
  using Direct = DirectUpdate<Rule, T, kStored>;
  const Direct direct(sweep, pipeline, args.factors[i]);
  const std::int64_t begin = std::int64_t{block} * kSumBlock, left = sweep.size - begin;
  const std::int64_t size = left < kSumBlock ? left : kSumBlock;
  const std::int64_t whole = direct.is_aligned(begin) ? size / Direct::kWide * Direct::kWide : 0;
  const RuleOperators<Rule, T> rule(pipeline.operations[0], pipeline.constants[0]);
  constexpr std::int64_t kWide = Direct::kWide;
  for (std::int64_t k = kWide * threads.first(); k < whole; k += kWide * threads.count()) {
    direct.template step<kWide>(begin + k, rule);
  }
  for (std::int64_t k = whole + threads.first(); k < size; k += threads.count()) direct.template step<1>(begin + k, rule);
}

}  // namespace gradstep::cuda
