// The program for any pipeline: a block of threads carries tiles through it, decoded, in shared memory. Thread k of n has the
// elements k, k + n, ... of a tile, of every operand, so what one operation leaves the next finds without waiting; only what
// looks at several elements (sums, formats in blocks) waits for the others.
#pragma once

#include "access.h"

namespace gradstep::cuda {

template <class T, class Threads>
class Tiles {
 public:
  GRADSTEP_PROGRAM Tiles(const Threads& threads, const Args& args, std::uint32_t item)
      : threads_(threads),
        item_(args.items[item]),
        sweep_(item_.sweep),
        pipeline_(args.pipelines[item]),
        moment_(args.moments[item]),
        factors_(args.factors[item]) {
    std::byte* memory = threads.shared();
    room_ = reinterpret_cast<Room*>(memory);
    memory += sizeof(Room);
    if (pipeline_.by_row) {
      rows_ = reinterpret_cast<Rows*>(memory);
      memory += sizeof(Rows);
    }
    tiles_ = reinterpret_cast<T*>(memory);
  }

  // Carries one block of sums through the pipeline.
  GRADSTEP_PROGRAM void block(std::uint32_t block, Sums* to) {
    const std::int64_t begin = block * sweep_.block(), limit = begin + sweep_.block();
    const std::int64_t end = limit < sweep_.size ? limit : sweep_.size;
    if (threads_.first() == 0) room_->sums = Sums{};
    threads_.sync();
    if (pipeline_.by_row) {
      for (std::int64_t at = begin; at < end; at += sweep_.group()) {
        rows(at, at + sweep_.group() < end ? at + sweep_.group() : end);
      }
    } else {
      for (std::int64_t at = begin; at < end; at += kTile) tile(pipeline_.passes[0], at, at + kTile < end ? at + kTile : end);
    }
    threads_.sync();
    if (to && threads_.first() == 0) *to = room_->sums;
  }

 private:
  // ---- tiles ----------------------------------------------------------------------------------------------------------------

  GRADSTEP_HD T* slot(int k) const { return tiles_ + std::int64_t{k} * kTile; }
  GRADSTEP_HD T* scratch() const { return slot(sweep_.n_operands); }
  GRADSTEP_HD T* update() const { return slot(sweep_.n_operands + 1); }
  GRADSTEP_HD T* rest() const { return slot(sweep_.n_operands + 2); }
  GRADSTEP_HD T* param() const { return slot(0); }
  GRADSTEP_HD T* extra(int which) const {
    int k = 2 + sweep_.n_states;
    for (int before = 0; before < which; ++before) k += static_cast<int>(sweep_.extras >> before & 1);
    return slot(k);
  }

  // Calls each(i) for this thread's elements of the tile.
  template <class Each>
  GRADSTEP_HD void for_each(Each each) const {
    GRADSTEP_UNROLL(1) for (std::uint32_t i = threads_.first(); i < size_; i += threads_.count()) each(i);
  }

  GRADSTEP_PROGRAM void tile(const Pass& pass, std::int64_t begin, std::int64_t end) {
    begin_ = begin;
    size_ = static_cast<std::uint32_t>(end - begin);
    scale_ = T(pipeline_.scale);
    factor_ = T(factors_.gradient);
    row_ = sweep_.row > 0 && sweep_.row < size_ ? static_cast<std::uint32_t>(sweep_.row) : size_;
    grad_ = slot(1);
    threads_.sync();  // what looked at the tile before has seen it
    const bool weighs = pipeline_.weighs && pass.loads & 2;
    for (int k = 0; k < sweep_.n_operands; ++k) {
      if (pass.loads >> k & 1 && !(k == 1 && weighs)) load_operand(k);
    }
    if (weighs) weigh();
    for (int i = pass.begin; i < pass.end; ++i) operate(pipeline_.operations[i], pipeline_.constants[i]);
    for (int k = 0; k < sweep_.n_operands; ++k) {
      if (pass.stores >> k & 1 && (k > 0 || stores_param_ == Param::kItself)) store_operand(k);
    }
    if (stores_param_ == Param::kCopy) {
      const T* p = param();
      for_each([&](std::uint32_t i) { copy_of_row()[i] = p[i]; });
    }
    if (pipeline_.zeroes_gradient && &pass == &pipeline_.passes[pipeline_.n_passes - 1]) zero_gradients();
  }

  // Carries whole rows, one or a few short ones, through all passes.
  GRADSTEP_PROGRAM void rows(std::int64_t begin, std::int64_t end) {
    const auto n_rows = static_cast<std::uint32_t>((end - begin) / sweep_.row);
    const auto for_rows = [&](auto each) {
      threads_.sync();
      for (std::uint32_t row = threads_.first(); row < n_rows; row += threads_.count()) each(row);
      threads_.sync();
    };
    for_rows([&](std::uint32_t row) { rows_->values[row] = RowValues{}; });
    // A copy of the parameter lives from the first pass to the last, so that it is rounded once.
    const bool keeps = pipeline_.n_passes > 1 && !sweep_.operands[0].is_in_place(sweep_.compute);
    const bool is_long = end - begin > kTile;
    for (int p = 0; p < pipeline_.n_passes; ++p) {
      const Pass& pass = pipeline_.passes[p];
      loads_param_ = keeps && p > 0 ? (is_long ? Param::kCopy : Param::kHere) : Param::kItself;
      stores_param_ = keeps && p < pipeline_.n_passes - 1 ? (is_long ? Param::kCopy : Param::kHere) : Param::kItself;
      for_rows([&](std::uint32_t row) { rows_->sums[row] = RowSums{}; });
      for (std::int64_t at = begin; at < end; at += kTile) tile(pass, at, at + kTile < end ? at + kTile : end);
      if (pass.finish == RowResult::kNone) continue;
      for_rows([&](std::uint32_t row) {
        rows_->values[row] = finish_row(pass.finish, pipeline_.constants[pass.finish_constants], rows_->sums[row], sweep_.row,
                                        factors_.gradient);
      });
    }
  }

  // ---- loading and storing --------------------------------------------------------------------------------------------------

  // Where the parameter comes from or goes to: its own memory, the copy of a long row, or it stays in its tile.
  enum class Param : std::uint8_t { kItself, kCopy, kHere };

  GRADSTEP_HD T* copy_of_row() const { return reinterpret_cast<T*>(item_.long_rows) + begin_; }
  GRADSTEP_HD bool is_in_two() const { return pipeline_.precision > Precision::kStochastic; }

  GRADSTEP_PROGRAM void load_operand(int k) {
    const Param from = k == 0 ? loads_param_ : Param::kItself;
    if (from == Param::kHere) return;
    T* to = slot(k);
    if (from == Param::kCopy) return for_each([&](std::uint32_t i) { to[i] = copy_of_row()[i]; });
    load(sweep_.operands[k], to);
    if (k != 0 || !is_in_two()) return;
    T* left = rest();
    load(sweep_.rest, left);
    visit_precision(pipeline_.precision, sweep_.operands[0].format, [&]<Precision kPrecision, class Half>() {
      for_each([&](std::uint32_t i) { to[i] = joined<kPrecision, Half>(to[i], left[i]); });
    });
  }

  GRADSTEP_PROGRAM void store_operand(int k) {
    T* from = slot(k);
    if (k == 0 && is_in_two()) {
      T *stored = scratch(), *left = rest();
      visit_precision(pipeline_.precision, sweep_.operands[0].format, [&]<Precision kPrecision, class Half>() {
        for_each([&](std::uint32_t i) { part_in_two<kPrecision, Half>(from[i], stored[i], left[i]); });
      });
      store(sweep_.operands[0], stored, k, false);
      return store(sweep_.rest, left, k, false);
    }
    store(sweep_.operands[k], from, k, k == 0 ? pipeline_.precision == Precision::kStochastic : pipeline_.states_by_chance);
  }

  GRADSTEP_PROGRAM void load(const Operand& operand, T* to) const {
    if (is_compressed(operand.format)) {
      return visit_blocks(operand.format, [&]<class B>() {
        const auto* codes = reinterpret_cast<const std::uint8_t*>(operand.data);
        for_each([&](std::uint32_t i) {
          const std::int64_t at = begin_ + i;
          const std::uint32_t code = B::bits == 8 ? codes[at] : codes[at / 2] >> (at % 2 * 4) & 15u;
          to[i] = T(B::decode(code) * operand.scales[at / B::block]);
        });
      });
    }
    visit_format(operand.format, [&]<class F>() {
      using X = typename F::Stored;
      for_each([&](std::uint32_t i) {
        const std::byte* at = element_of(sweep_, operand, begin_ + i, sizeof(X));
        to[i] = flushed(F::template decode<T>(*reinterpret_cast<const X*>(at)));
      });
    });
  }

  GRADSTEP_PROGRAM void store(const Operand& operand, T* from, int k, bool by_chance) {
    const Draws draws{{{static_cast<std::uint32_t>(pipeline_.seed), static_cast<std::uint32_t>(pipeline_.seed >> 32)}},
                      static_cast<std::uint32_t>(k),
                      static_cast<std::uint32_t>(moment_.position),
                      static_cast<std::uint32_t>(static_cast<std::uint64_t>(moment_.step))};
    if (is_compressed(operand.format)) {
      threads_.sync();
      visit_blocks(operand.format, [&]<class B>() { store_codes<B>(operand, from, draws, by_chance); });
      return;
    }
    visit_format(operand.format, [&]<class F>() {
      using X = typename F::Stored;
      const auto put = [&](auto encoded) {
        for_each(
            [&](std::uint32_t i) { *reinterpret_cast<X*>(element_of(sweep_, operand, begin_ + i, sizeof(X))) = encoded(i); });
      };
      if constexpr (requires { F::encode_by_chance(0.0f, 0u); }) {
        if (by_chance) {
          return put([&](std::uint32_t i) {
            return F::encode_by_chance(static_cast<float>(from[i]), draws.at(static_cast<std::uint64_t>(begin_ + i)));
          });
        }
      }
      put([&](std::uint32_t i) { return F::encode(flushed(from[i])); });
    });
  }

  // Each block of the format by a warp.
  template <class B>
  GRADSTEP_PROGRAM void store_codes(const Operand& operand, const T* from, const Draws& draws, bool by_chance) const {
    auto* codes = reinterpret_cast<std::uint8_t*>(operand.data);
    constexpr auto kBlock = static_cast<std::uint32_t>(B::block);
    for (std::uint32_t first = threads_.warp() * kBlock; first < size_; first += threads_.n_warps() * kBlock) {
      const std::uint32_t length = size_ - first < kBlock ? size_ - first : kBlock;
      const std::int64_t at = begin_ + first;
      std::uint32_t largest = 0;
      for (std::uint32_t i = threads_.lane(); i < length; i += threads_.lanes()) {
        const std::uint32_t bits = bits_of(static_cast<float>(from[first + i])) & ~kSignBit;
        largest = bits > largest ? bits : largest;
      }
      const float scale = block_scale(threads_.warp_max(largest));
      if (threads_.lane() == 0) operand.scales[at / B::block] = scale;
      const BlockInverse inverse(scale);
      const auto code = [&](std::uint32_t i) -> std::uint32_t {
        if (i >= length || !inverse.exists()) return 0;
        const std::uint32_t bits = bits_of(static_cast<float>(from[first + i]));
        const float y = float_of(bits & ~kSignBit) * inverse.before * inverse.factor;
        if (by_chance) return B::template encode<true>(y, bits & kSignBit, draws.at(static_cast<std::uint64_t>(at + i)));
        return B::template encode<false>(y, bits & kSignBit, 0);
      };
      constexpr std::uint32_t kPerByte = 8 / B::bits;
      for (std::uint32_t byte = threads_.lane(); byte * kPerByte < length; byte += threads_.lanes()) {
        std::uint32_t both = code(byte * kPerByte);
        if (kPerByte == 2) both |= code(byte * kPerByte + 1) << 4;
        codes[at / kPerByte + byte] = static_cast<std::uint8_t>(both);
      }
    }
  }

  GRADSTEP_HD const Operand& gradient(int i) const { return i == 0 ? sweep_.operands[1] : sweep_.more_gradients[i - 1]; }

  // scratch <- w_1 g_1 + w_2 g_2 + ...
  GRADSTEP_PROGRAM void weigh() {
    T *sum = scratch(), *g = slot(1);
    for (int n = 0; n <= sweep_.n_more_gradients; ++n) {
      load(gradient(n), g);
      const T weight = T((pipeline_.weights ? pipeline_.weights[n] : 1) * pipeline_.weight_scale);
      for_each([&](std::uint32_t i) { sum[i] = n == 0 ? weight * g[i] : sum[i] + weight * g[i]; });
    }
    grad_ = sum;
  }

  GRADSTEP_PROGRAM void zero_gradients() {
    T* zeros = slot(1);
    for_each([&](std::uint32_t i) { zeros[i] = T(0); });
    for (int n = 0; n <= sweep_.n_more_gradients; ++n) store(gradient(n), zeros, 1, false);
  }

  // ---- operations -----------------------------------------------------------------------------------------------------------

  GRADSTEP_PROGRAM void operate(const Operation& operation, const std::byte* constants) {
    T *p = param(), *u = update(), *out = scratch();
    const auto change_gradient = [&](auto element) { for_each([&](std::uint32_t i) { out[i] = element(out[i]); }); };
    switch (operation.loop) {
      case Loop::kUpdate:
      case Loop::kDirection:
        return apply_rule(operation, constants);
      case Loop::kGradientStage:
        return visit_at(GradientStages{}, operation.index,
                        [&]<class Stage>() { change_gradient(constants_of<typename Stage::template Op<T>>(constants)); });
      case Loop::kFactors: {
        const T* g = grad_;
        for_each([&](std::uint32_t i) { out[i] = scaled_gradient(g[i], scale_, factor_); });
        scale_ = factor_ = T(1);
        grad_ = out;
        return;
      }
      case Loop::kScaleRow:
        return for_each([&](std::uint32_t i) { out[i] = T(rows_->values[i / row_].factor) * out[i]; });
      case Loop::kCentralize:
        return for_each([&](std::uint32_t i) { out[i] = out[i] - T(rows_->values[i / row_].mean); });
      case Loop::kNoise: {
        const auto noise = constants_of<NoiseConstants>(constants);
        const Normal normal{
            {{static_cast<std::uint32_t>(noise.seed), static_cast<std::uint32_t>(noise.seed >> 32)}}, noise.stream, noise.step};
        const T deviation = T(noise.sigma);
        return for_each([&](std::uint32_t i) { out[i] += deviation * T(normal.at(static_cast<std::uint64_t>(begin_ + i))); });
      }
      case Loop::kCouple: {
        const auto op = constants_of<typename CoupledDecay::template Op<T>>(constants);
        const T* g = grad_;
        const T decayed = T(factors_.decayed);
        for_each([&](std::uint32_t i) { out[i] = op.gradient(g[i], p[i], decayed); });
        grad_ = out;
        return;
      }
      case Loop::kCautious: {
        const T *g = grad_, factor = T(factors_.cautious);
        return for_each([&](std::uint32_t i) { u[i] = cautious_update(u[i], g[i], factor); });
      }
      case Loop::kDecay: {
        const auto op = constants_of<typename DecoupledDecay::template Op<T>>(constants);
        return for_each([&](std::uint32_t i) { u[i] = op.total(u[i], p[i]); });
      }
      case Loop::kTrust: {
        const T factor = T(factors_.late_trust);
        return for_each([&](std::uint32_t i) { u[i] = factor * u[i]; });
      }
      case Loop::kApply:
        return for_each([&](std::uint32_t i) { p[i] = p[i] - u[i]; });
      case Loop::kParamStage:
        return visit_at(ParamStages{}, operation.index, [&]<class Stage>() {
          const auto op = constants_of<typename Stage::template Op<T>>(constants);
          for_each([&](std::uint32_t i) { p[i] = op(p[i]); });
        });
      case Loop::kScaleParamRow:
        return for_each([&](std::uint32_t i) { p[i] = T(rows_->values[i / row_].factor) * p[i]; });
      case Loop::kEma:
        return average(extra(kEma), constants);
      case Loop::kSwa:
        return average(extra(kSwa), constants);
      case Loop::kLookahead: {
        T* slow = extra(kSlow);
        average(slow, constants);
        return for_each([&](std::uint32_t i) { p[i] = slow[i]; });
      }
      default:
        return add_sums(operation.loop);
    }
  }

  GRADSTEP_PROGRAM void average(T* of, const std::byte* constants) const {
    const T weight = T(constants_of<double>(constants));
    const T* p = param();
    for_each([&](std::uint32_t i) { of[i] = averaged(of[i], p[i], weight); });
  }

  GRADSTEP_PROGRAM void apply_rule(const Operation& operation, const std::byte* constants) {
    visit_at(Rules{}, operation.index, [&]<class Rule>() {
      apply_rule(operation, RuleOperators<Rule, T>(operation, constants), std::make_index_sequence<Rule::states.size()>());
    });
  }

  template <class Rule, std::size_t... k>
  GRADSTEP_PROGRAM void apply_rule(const Operation& operation, const RuleOperators<Rule, T>& rule, std::index_sequence<k...>) {
    T *p = param(), *u = update();
    const T* g = grad_;
    const T scale = scale_, factor = factor_, decayed = T(factors_.decayed), trust = T(factors_.trust);
    const bool direct = operation.loop == Loop::kUpdate, dry = operation.dry;
    for_each([&](std::uint32_t i) {
      T states[sizeof...(k) + 1] = {slot(2 + static_cast<int>(k))[i]...};
      const T gradient = direct ? rule.gradient(scaled_gradient(g[i], scale, factor), p[i], decayed) : g[i];
      const T change = trust * rule.total(rule.update(p[i], gradient, states[k]...), p[i]);
      if (direct) p[i] = p[i] - change;
      else u[i] = change;
      if (!dry) ((slot(2 + static_cast<int>(k))[i] = states[k]), ...);
    });
  }

  // ---- sums -----------------------------------------------------------------------------------------------------------------

  GRADSTEP_PROGRAM void add_sums(Loop loop) {
    const T *g = grad_, *p = param(), *u = update();
    const T scale = scale_;
    threads_.sync();
    switch (loop) {
      case Loop::kSumGrad:
        add_squares(kGradSquares, g, scale);
        break;
      case Loop::kSumParam:
        add_squares(kParamSquares, p, T(1));
        break;
      case Loop::kSumRuleGrad:
        add_squares(kRuleGradSquares, g, T(1));
        break;
      case Loop::kSumUpdate:
        add_squares(kUpdateSquares, u, T(1));
        add_squares(kParamSquares, p, T(1));
        break;
      case Loop::kCountGrad:
        add_squares(kCameSquares, g, scale);
        count_gradient(g, scale);
        break;
      case Loop::kCountAgreeing:
        count_agreeing(u, g);
        break;
      case Loop::kSumRow:
        add_rows<Term::kElement>(&RowSums::grad, g, scale);
        break;
      case Loop::kSumRowSquares:
        add_rows<Term::kSquare>(&RowSums::grad_squares, g, scale);
        add_rows<Term::kSquare>(&RowSums::param_squares, p, T(1));
        break;
      case Loop::kSumParamRow:
        add_rows<Term::kSquare>(&RowSums::param_squares, p, T(1));
        break;
      default:
        break;
    }
    threads_.sync();
  }

  // The leaves of the tile, each by a warp; then in order. A tile that is no row is one leaf.
  GRADSTEP_PROGRAM void add_squares(Sum sum, const T* x, T scale) {
    const std::uint32_t n_leaves = (size_ + row_ - 1) / row_;
    for (std::uint32_t leaf = threads_.warp(); leaf < n_leaves; leaf += threads_.n_warps()) {
      const double of_leaf = leaf_of<Term::kSquare>(leaf, x, scale);
      if (threads_.lane() == 0) room_->leaves[leaf] = of_leaf;
    }
    threads_.sync();
    if (threads_.first() == 0) {
      double& total = room_->sums.at[sum];
      for (std::uint32_t leaf = 0; leaf < n_leaves; ++leaf) total += room_->leaves[leaf];
    }
    threads_.sync();
  }

  template <Term kTerm>
  GRADSTEP_PROGRAM void add_rows(double RowSums::* sum, const T* x, T scale) {
    const std::uint32_t n_rows = (size_ + row_ - 1) / row_;
    for (std::uint32_t row = threads_.warp(); row < n_rows; row += threads_.n_warps()) {
      const double of_row = leaf_of<kTerm>(row, x, scale);
      if (threads_.lane() == 0) rows_->sums[row].*sum += of_row;
    }
  }

  template <Term kTerm>
  GRADSTEP_PROGRAM double leaf_of(std::uint32_t leaf, const T* x, T scale) const {
    const T* from = x + leaf * row_;
    const std::uint32_t left = size_ - leaf * row_;
    return threads_.template leaf_sum<kTerm, T>(left < row_ ? left : row_, [&](std::uint32_t i) { return scale * from[i]; });
  }

  // Counts are whole numbers, so that any order will do.
  GRADSTEP_PROGRAM void count_gradient(const T* g, T scale) {
    if (threads_.warp() != 0) return;
    using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
    constexpr Bits kInfinite = sizeof(T) == 4 ? Bits(0x7f800000) : static_cast<Bits>(0x7ff0000000000000);
    constexpr Bits kMagnitude = static_cast<Bits>(~(Bits{1} << (8 * sizeof(T) - 1)));
    Bits largest = 0;
    std::uint32_t nans = 0, infs = 0, zeros = 0;
    for (std::uint32_t i = threads_.lane(); i < size_; i += threads_.lanes()) {
      const Bits x = std::bit_cast<Bits>(scale * g[i]) & kMagnitude;
      largest = x > largest ? x : largest;
      nans += x > kInfinite;
      infs += x == kInfinite;
      zeros += x == 0;
    }
    Sums here;
    here.at[kMaxAbs] = static_cast<double>(std::bit_cast<T>(threads_.warp_max(largest)));
    here.at[kNans] = static_cast<double>(threads_.warp_sum(nans));
    here.at[kInfs] = static_cast<double>(threads_.warp_sum(infs));
    here.at[kZeros] = static_cast<double>(threads_.warp_sum(zeros));
    if (threads_.lane() == 0) room_->sums.add(here);
  }

  GRADSTEP_PROGRAM void count_agreeing(const T* u, const T* g) {
    if (threads_.warp() != 0) return;
    std::uint32_t count = 0;
    for (std::uint32_t i = threads_.lane(); i < size_; i += threads_.lanes()) count += agree(u[i], g[i]) ? 1 : 0;
    count = threads_.warp_sum(count);
    if (threads_.lane() == 0) room_->sums.at[kAgreeing] += static_cast<double>(count);
  }

  const Threads& threads_;
  const Item& item_;
  const Sweep& sweep_;
  const Pipeline& pipeline_;
  const Moment& moment_;
  const Factors& factors_;
  Room* room_;
  Rows* rows_ = nullptr;
  T* tiles_;
  // Of the tile at hand.
  const T* grad_ = nullptr;
  T scale_ = T(1), factor_ = T(1);
  std::int64_t begin_ = 0;
  std::uint32_t size_ = 0, row_ = 0;
  Param loads_param_ = Param::kItself, stores_param_ = Param::kItself;
};

template <class T, class Threads>
GRADSTEP_PROGRAM void carry_tiles(const Threads& threads, const Args& args, std::uint32_t chunk) {
  const auto [i, block] = args.chunks[chunk];
  if (args.pipelines[i].n_passes == 0) return;
  Tiles<T, Threads>(threads, args, i).block(block, args.blocks + args.items[i].first_block + block);
}

}  // namespace gradstep::cuda
