// How operands come to the operations of a pipeline: in place, or decoded tile by tile. Included by kernels.cpp alone, once per
// instruction set: all of it has internal linkage.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "codecs.h"

namespace gradstep::cpu {
namespace {

template <class T>
constexpr Format kComputeFormat = sizeof(T) == 4 ? Format::kFloat32 : Format::kFloat64;

template <class T>
GRADSTEP_HD T* in_place(const Operand& operand, std::int64_t begin) {
  return operand.is_in_place(kComputeFormat<T>) ? reinterpret_cast<T*>(operand.data) + begin : nullptr;
}

// Where operand `k` stands, if the operations of the pipeline take it as it is stored; else null.
template <class T>
GRADSTEP_HD T* as_stored(const Sweep& sweep, std::uint32_t brains, int k, std::int64_t begin) {
  const Operand& operand = sweep.operands[k];
  if (brains >> k & 1) return reinterpret_cast<T*>(operand.data + begin * static_cast<std::int64_t>(sizeof(Brain)));
  return in_place<T>(operand, begin);
}

// ---- tiles ----------------------------------------------------------------------------------------------------------------

// How far ahead, in elements, memory is asked for operands: by the loop of a rule; by the loops on a tile, of which some ask
// for nothing; by one that does nothing but add operands up, which is at its end sooner.
constexpr std::int64_t kAhead = 512, kAheadInTiles = 768, kAheadInSums = 4096;

template <class T>
const TypedKernels& kernels_of();

// A pipeline with the loops of its operations.
template <class T>
class Bound {
 public:
  Bound(const Sweep& sweep, const Pipeline& pipeline) : pipeline_(pipeline) {
    const Brains brains = sizeof(T) == sizeof(float) ? take_brains(sweep) : Brains::kNone;
    const TypedKernels& kernels = kernels_of<T>();
    for (int i = 0; i < pipeline.size; ++i) functions_[i] = kernels.find(pipeline.operations[i], brains);
  }

  // Operands that the operations take as they are stored, in bfloat16; a bit each.
  std::uint32_t brains() const { return brains_; }

  void run(const Pass& pass, Tile<T>& tile) const {
    for (int i = pass.begin; i < pass.end; ++i) functions_[i](pipeline_.constants[i], &tile);
  }

 private:
  // What other operations than an update look at they find in the compute type, and what is stored otherwise than to nearest
  // goes through a copy.
  Brains take_brains(const Sweep& sweep) {
    if (pipeline_.in_tiles || sweep.extras != 0 || pipeline_.operations[0].loop != Loop::kUpdate) return Brains::kNone;
    const auto is_brain = [&](int k) { return sweep.operands[k].format == Format::kBFloat16 && !sweep.operands[k].strides; };
    const std::uint32_t all_states = ((1u << sweep.n_states) - 1) << 2;
    bool states = sweep.n_states > 0 && !pipeline_.states_by_chance;
    for (int k = 2; k < 2 + sweep.n_states; ++k) states = states && is_brain(k);
    const bool grad = is_brain(1), param = grad && is_brain(0) && pipeline_.precision == Precision::kNearest;
    brains_ = (param ? 1u : 0u) | (grad ? 2u : 0u) | (states ? all_states : 0u);
    if (param) return states ? Brains::kAll : Brains::kParamAndGrad;
    if (grad) return states ? Brains::kGradAndStates : Brains::kGrad;
    return states ? Brains::kStates : Brains::kNone;
  }

  const Pipeline& pipeline_;
  std::uint32_t brains_ = 0;
  Function functions_[Pipeline::kMaxOperations];
};

// What belongs to one thread while it carries tiles through a pipeline.
template <class T>
class Carrier {
 public:
  Carrier(const Work& work, const Bound<T>& bound, bool prefetch)
      : work_(work), sweep_(*work.sweep), pipeline_(*work.pipeline), bound_(bound) {
    tile_.scratch = scratch_;
    tile_.update = update_;
    tile_.decayed_factor = T(work.factors.decayed);
    tile_.cautious_factor = T(work.factors.cautious);
    tile_.trust_factor = T(work.factors.trust);
    tile_.late_trust_factor = T(work.factors.late_trust);
    tile_.row_values = row_values_;
    tile_.row_sums = row_sums_;
    slots_[0] = &tile_.param;
    slots_[1] = &gradient_;
    int k = 2;
    for (int state = 0; state < sweep_.n_states; ++state) slots_[k++] = &tile_.states[state];
    for (int extra = 0; extra < kMaxExtras; ++extra) {
      if (sweep_.extras >> extra & 1) slots_[k++] = &tile_.extras[extra];
    }
    for (k = 0; k < sweep_.n_operands; ++k) {
      if (!as_stored<T>(sweep_, bound_.brains(), k, 0)) copied_ |= 1u << k;
    }
    tile_.copied = copied_;
    if (prefetch) tile_.ahead = pipeline_.in_tiles || copied_ ? kAheadInTiles : kAheadInSums;
  }

  // To be called at the end. (A destructor would bring the runtime of exceptions along, and with it symbols that objects
  // share.)
  void release() { std::free(long_row_); }

  Carrier(const Carrier&) = delete;
  Carrier& operator=(const Carrier&) = delete;

  // Whether operands are copied, tile by tile.
  bool copies() const { return copied_ != 0; }

  // Carries elements [begin, end), a tile at most, through a pass. Pipelines of sums alone take more.
  void tile(const Pass& pass, std::int64_t begin, std::int64_t end) {
    const std::int64_t size = end - begin;
    for (int k = 0; k < sweep_.n_operands; ++k) {
      *slots_[k] = copied_ >> k & 1 ? copies_[k] : as_stored<T>(sweep_, bound_.brains(), k, begin);
    }
    if (long_row_) tile_.param = long_row_ + (begin - row_begin_);
    tile_.grad = gradient_;
    tile_.begin = begin;
    tile_.size = size;
    tile_.scale = T(pipeline_.scale);
    tile_.gradient_factor = T(work_.factors.gradient);
    tile_.row = sweep_.row > 0 && sweep_.row < size ? sweep_.row : size;
    tile_.sums = work_.sums ? work_.sums + begin / block_ : nullptr;
    const bool weighs = pipeline_.weighs && pass.loads & 2;
    if (copied_) load_copies(weighs ? pass.loads & ~2u : pass.loads);
    if (weighs) weigh();

    bound_.run(pass, tile_);

    if (copied_) store_copies(pass.stores);
    if (pipeline_.zeroes_gradient && &pass == &pipeline_.passes[pipeline_.n_passes - 1]) zero_gradients(begin, size);
  }

  // Carries whole rows, one or a few short ones, through all passes.
  void rows(std::int64_t begin, std::int64_t end) {
    const std::int64_t n_rows = (end - begin) / sweep_.row;
    std::fill_n(row_values_, n_rows, RowValues{});
    // A copy of the parameter lives from the first pass to the last, so that it is rounded once.
    const bool keeps = copied_ & 1 && pipeline_.n_passes > 1;
    if (keeps && end - begin > kTile && !long_row_) {
      long_row_ = static_cast<T*>(std::malloc(static_cast<std::size_t>(sweep_.row) * sizeof(T)));
      if (!long_row_) std::abort();  // too late for an error: other parameters have moved
    }
    row_begin_ = begin;
    for (int p = 0; p < pipeline_.n_passes; ++p) {
      loads_param_ = !keeps || p == 0;
      stores_param_ = !keeps || p == pipeline_.n_passes - 1;
      const Pass& pass = pipeline_.passes[p];
      std::fill_n(row_sums_, n_rows, RowSums{});
      for (std::int64_t at = begin; at < end; at += kTile) tile(pass, at, std::min(at + kTile, end));
      if (pass.finish == RowResult::kNone) continue;
      for (std::int64_t row = 0; row < n_rows; ++row) {
        row_values_[row] = finish_row(pass.finish, pipeline_.constants[pass.finish_constants], row_sums_[row], sweep_.row,
                                      work_.factors.gradient);
      }
    }
  }

 private:
  const Operand& gradient(int i) const { return i == 0 ? sweep_.operands[1] : sweep_.more_gradients[i - 1]; }

  bool is_in_two() const { return pipeline_.precision > Precision::kStochastic; }
  Part part(const Operand& operand, std::int64_t ahead = 0) const { return {sweep_, operand, tile_.begin, tile_.size, ahead}; }

  // What comes decoded is asked for as far ahead as what is in place.
  void load_copies(std::uint32_t operands) {
    if (!loads_param_) operands &= ~1u;
    for (int k = 0; k < sweep_.n_operands; ++k) {
      if (copied_ & operands & 1u << k) load_part(part(sweep_.operands[k], tile_.ahead), k == 0 ? tile_.param : copies_[k]);
    }
    if (!(operands & 1u) || !is_in_two()) return;
    load_part(part(sweep_.rest, tile_.ahead), rest_);
    join(pipeline_.precision, sweep_.operands[0].format, tile_.size, tile_.param, rest_);
  }

  void store_copies(std::uint32_t operands) {
    if (!stores_param_) operands &= ~1u;
    for (int k = 0; k < sweep_.n_operands; ++k) {
      if (!(copied_ & operands & 1u << k)) continue;
      if (k == 0 && is_in_two()) {
        cpu::part(pipeline_.precision, sweep_.operands[0].format, tile_.size, tile_.param, scratch_, rest_);
        store_part(part(sweep_.operands[0]), scratch_);
        store_part(part(sweep_.rest), rest_);
        continue;
      }
      Part to = part(sweep_.operands[k]);
      if (k == 0 ? pipeline_.precision == Precision::kStochastic : pipeline_.states_by_chance) to.draws = draw(k);
      store_part(to, k == 0 ? tile_.param : copies_[k]);
    }
  }

  // 16 random bits for each element of the tile.
  const std::uint32_t* draw(int operand) {
    if (bits_of(sweep_.operands[operand].format) > 16) return nullptr;
    const Draws draws{{{static_cast<std::uint32_t>(pipeline_.seed), static_cast<std::uint32_t>(pipeline_.seed >> 32)}},
                      static_cast<std::uint32_t>(operand),
                      work_.stream,
                      work_.step};
    const std::int64_t first = tile_.begin / Draws::kGroup, end = (tile_.begin + tile_.size - 1) / Draws::kGroup + 1;
    for (std::int64_t group = first; group < end; ++group) {
      draws(static_cast<std::uint64_t>(group), draws_ + (group - first) * Draws::kGroup);
    }
    return draws_ + (tile_.begin - first * Draws::kGroup);
  }

  // scratch <- w_1 g_1 + w_2 g_2 + ...
  void weigh() {
    for (int i = 0; i <= sweep_.n_more_gradients; ++i) {
      const T* g = in_place<T>(gradient(i), tile_.begin);
      if (!g) {
        load_part(part(gradient(i), tile_.ahead), copies_[1]);
        g = copies_[1];
      }
      const T weight = T((pipeline_.weights ? pipeline_.weights[i] : 1) * pipeline_.weight_scale);
      T* sum = scratch_;
      if (i == 0) {
        for_each(tile_.size, Ahead{tile_.ahead}, [=](std::int64_t j) GRADSTEP_INLINE_LAMBDA { sum[j] = weight * g[j]; }, g);
      } else {
        for_each(tile_.size, Ahead{tile_.ahead}, [=](std::int64_t j) GRADSTEP_INLINE_LAMBDA { sum[j] += weight * g[j]; }, g);
      }
    }
    tile_.grad = scratch_;
  }

  void zero_gradients(std::int64_t begin, std::int64_t size) {
    for (int i = 0; i <= sweep_.n_more_gradients; ++i) {
      T* g = in_place<T>(gradient(i), begin);
      T* zeros = g ? g : copies_[1];
      for_each(size, Ahead{0}, [=](std::int64_t j) GRADSTEP_INLINE_LAMBDA { zeros[j] = T(0); }, zeros);
      if (!g) store_part(part(gradient(i)), zeros);
    }
  }

  const Work& work_;
  const Sweep& sweep_;
  const Pipeline& pipeline_;
  const Bound<T>& bound_;
  const std::int64_t block_ = sweep_.block();
  Tile<T> tile_{};
  T* gradient_ = nullptr;
  T** slots_[kMaxOperands];  // where the tile has each operand
  std::uint32_t copied_ = 0;  // operands that are, a bit each
  T* long_row_ = nullptr;  // the copy of the parameter, where a row is longer than a tile
  std::int64_t row_begin_ = 0;
  bool loads_param_ = true, stores_param_ = true;
  RowValues row_values_[kMaxRows];
  RowSums row_sums_[kMaxRows];
  // Not at a distance of a whole page from each other: a load right after a store at such a distance waits for it.
  static constexpr std::int64_t kApart = kTile + 64 / static_cast<std::int64_t>(sizeof(T));
  alignas(64) T copies_[kMaxOperands][kApart];
  alignas(64) T scratch_[kApart];
  alignas(64) T update_[kApart];
  alignas(64) T rest_[kApart];
  alignas(64) std::uint32_t draws_[kTile + 2 * Draws::kGroup];
};

template <class T>
GRADSTEP_NOINLINE void sweep_in_tiles(const Work& work, const Bound<T>& bound, std::int64_t begin, std::int64_t end,
                                      bool prefetch) {
  Carrier<T> carrier(work, bound, prefetch);
  const Sweep& sweep = *work.sweep;
  if (work.pipeline->by_row) {
    // Pieces begin with a block, and rows of two blocks do not mix.
    const std::int64_t group = sweep.group(), block = sweep.block();
    while (begin < end) {
      const std::int64_t next = std::min({begin + group, (begin / block + 1) * block, end});
      carrier.rows(begin, next);
      begin = next;
    }
    carrier.release();
    return;
  }
  // Leaves of sums stand where they have to, and so do blocks of a format. Other tiles begin where cache lines do.
  const Pass& pass = work.pipeline->passes[0];
  const bool anywhere = !work.sums && !std::any_of(sweep.operands, sweep.operands + sweep.n_operands,
                                                   [](const Operand& operand) { return is_compressed(operand.format); });
  if (anywhere && in_place<T>(sweep.operands[0], 0)) {
    const std::int64_t head = to_next_line(in_place<T>(sweep.operands[0], begin));
    if (head > 0) {
      const std::int64_t first = std::min(begin + kTile - 64 / static_cast<std::int64_t>(sizeof(T)) + head, end);
      carrier.tile(pass, begin, first);
      begin = first;
    }
  }
  const std::int64_t step = work.pipeline->in_tiles || carrier.copies() ? kTile : kSumBlock;
  for (; begin < end; begin += step) carrier.tile(pass, begin, std::min(begin + step, end));
}

template <class T>
void sweep(const Work& work, std::int64_t begin, std::int64_t end, bool prefetch) {
  if (begin == end) return;
  const Sweep& sweep = *work.sweep;
  const Pipeline& pipeline = *work.pipeline;
  const Bound<T> bound(sweep, pipeline);
  bool direct = !pipeline.in_tiles && !work.sums;
  for (int k = 0; k < sweep.n_operands; ++k) direct = direct && as_stored<T>(sweep, bound.brains(), k, 0);
  if (!direct) return sweep_in_tiles<T>(work, bound, begin, end, prefetch);

  Tile<T> tile{};
  tile.param = as_stored<T>(sweep, bound.brains(), 0, begin);
  tile.grad = as_stored<T>(sweep, bound.brains(), 1, begin);
  for (int k = 0; k < sweep.n_states; ++k) tile.states[k] = as_stored<T>(sweep, bound.brains(), 2 + k, begin);
  tile.begin = begin;
  tile.size = end - begin;
  tile.ahead = prefetch ? kAhead : 0;
  tile.scale = T(pipeline.scale);
  tile.gradient_factor = T(work.factors.gradient);
  tile.decayed_factor = T(work.factors.decayed);
  tile.trust_factor = T(work.factors.trust);
  bound.run(pipeline.passes[0], tile);
}

}  // namespace
}  // namespace gradstep::cpu
