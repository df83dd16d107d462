// How operands come to the operations of a pipeline: in place, or decoded tile by tile. Included by kernels.cpp alone, once per
// instruction set: all of it has internal linkage.
#pragma once

#include <algorithm>

#include "loops.h"

namespace gradstep::cpu {
namespace {

// ---- load and store -------------------------------------------------------------------------------------------------------

// Calls row(offset in bytes, index in the tile, length) for each innermost row of elements [begin, begin + size).
template <class Row>
GRADSTEP_HD void for_rows(const Sweep& sweep, const std::int64_t* strides, std::int64_t begin, std::int64_t size, Row row) {
  const int last = sweep.ndim - 1;
  std::int64_t at[kMaxDims], offset = 0, rest = begin;
  for (int d = last; d >= 0; --d) {
    at[d] = rest % sweep.shape[d];
    rest /= sweep.shape[d];
    offset += at[d] * strides[d];
  }
  for (std::int64_t done = 0; done < size;) {
    const std::int64_t left = sweep.shape[last] - at[last], length = left < size - done ? left : size - done;
    row(offset, done, length);
    done += length;
    offset -= at[last] * strides[last];
    at[last] = 0;
    for (int d = last - 1; d >= 0; --d) {
      offset += strides[d];
      if (++at[d] < sweep.shape[d]) break;
      offset -= at[d] * strides[d];
      at[d] = 0;
    }
  }
}

template <class Format, class T>
void load(const Sweep& sweep, const Operand& operand, std::int64_t begin, std::int64_t size, T* out) {
  using Stored = typename Format::Stored;
  const std::int64_t stride = operand.strides[sweep.ndim - 1];
  for_rows(sweep, operand.strides, begin, size, [&](std::int64_t offset, std::int64_t first, std::int64_t length) {
    const std::byte* in = operand.data + offset;
    for (std::int64_t i = 0; i < length; ++i) {
      out[first + i] = Format::template decode<T>(*reinterpret_cast<const Stored*>(in + i * stride));
    }
  });
}

template <class Format, class T>
void store(const Sweep& sweep, const Operand& operand, std::int64_t begin, std::int64_t size, const T* in) {
  using Stored = typename Format::Stored;
  const std::int64_t stride = operand.strides[sweep.ndim - 1];
  for_rows(sweep, operand.strides, begin, size, [&](std::int64_t offset, std::int64_t first, std::int64_t length) {
    std::byte* out = operand.data + offset;
    for (std::int64_t i = 0; i < length; ++i) {
      *reinterpret_cast<Stored*>(out + i * stride) = Format::encode(in[first + i]);
    }
  });
}

template <class T>
struct Codec {
  void (*load)(const Sweep&, const Operand&, std::int64_t, std::int64_t, T*);
  void (*store)(const Sweep&, const Operand&, std::int64_t, std::int64_t, const T*);
};

template <class T, class... F>
const Codec<T>& codec(Format format, List<F...>) {
  static constexpr Codec<T> kCodecs[] = {{load<F, T>, store<F, T>}...};
  return kCodecs[static_cast<int>(format)];
}

template <class T>
GRADSTEP_HD T* in_place(const Operand& operand, std::int64_t begin) {
  return operand.strides ? nullptr : reinterpret_cast<T*>(operand.data) + begin;
}

// ---- tiles ----------------------------------------------------------------------------------------------------------------

// How far ahead, in elements, memory is asked for operands: by the loop of a rule; by the loops on a tile, of which some ask
// for nothing; by one that does nothing but add operands up, which is at its end sooner.
constexpr std::int64_t kAhead = 512, kAheadInTiles = 768, kAheadInSums = 4096;

template <class T>
GRADSTEP_HD void run(const Pipeline& pipeline, const Pass& pass, Tile<T>& tile) {
  for (int i = pass.begin; i < pass.end; ++i) pipeline.operations[i](pipeline.constants[i], &tile);
}

// What belongs to one thread while it carries tiles through a pipeline.
template <class T>
class Carrier {
 public:
  Carrier(const Work& work, bool prefetch) : work_(work), sweep_(*work.sweep), pipeline_(*work.pipeline) {
    tile_.scratch = scratch_;
    tile_.update = update_;
    if (prefetch) tile_.ahead = work.pipeline->in_tiles ? kAheadInTiles : kAheadInSums;
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
      const Operand& operand = sweep_.operands[k];
      in_place_[k] = operand.strides ? nullptr : reinterpret_cast<T*>(operand.data);
      if (!in_place_[k]) copied_ |= 1u << k;
    }
  }

  // Whether operands are copied, tile by tile.
  bool copies() const { return copied_ != 0; }

  // Carries elements [begin, end), a tile at most, through a pass. Pipelines of sums alone take more.
  void tile(const Pass& pass, std::int64_t begin, std::int64_t end) {
    const std::int64_t size = end - begin;
    for (int k = 0; k < sweep_.n_operands; ++k) *slots_[k] = in_place_[k] ? in_place_[k] + begin : copies_[k];
    tile_.grad = gradient_;
    tile_.begin = begin;
    tile_.size = size;
    tile_.scale = T(pipeline_.scale);
    tile_.gradient_factor = T(work_.factors.gradient);
    tile_.row = sweep_.row > 0 && sweep_.row < size ? sweep_.row : size;
    tile_.sums = work_.sums ? work_.sums + begin / block_ : nullptr;
    const bool weighs = pipeline_.weights && pass.loads & 2;
    if (copied_) load_copies(weighs ? pass.loads & ~2u : pass.loads);
    if (weighs) weigh();

    run(pipeline_, pass, tile_);

    if (copied_) store_copies(pass.stores);
    if (pipeline_.zeroes_gradient && &pass == &pipeline_.passes[pipeline_.n_passes - 1]) zero_gradients(begin, size);
  }

  // Carries whole rows, one or a few short ones, through all passes.
  void rows(std::int64_t begin, std::int64_t end) {
    const std::int64_t n_rows = (end - begin) / sweep_.row;
    std::fill_n(row_values_, n_rows, RowValues{});
    for (int p = 0; p < pipeline_.n_passes; ++p) {
      const Pass& pass = pipeline_.passes[p];
      std::fill_n(row_sums_, n_rows, RowSums{});
      for (std::int64_t at = begin; at < end; at += kTile) tile(pass, at, std::min(at + kTile, end));
      for (std::int64_t row = 0; pass.finish && row < n_rows; ++row) {
        row_values_[row] =
            pass.finish(pipeline_.constants[pass.finish_constants], row_sums_[row], sweep_.row, work_.factors.gradient);
      }
    }
  }

 private:
  const Operand& gradient(int i) const { return i == 0 ? sweep_.operands[1] : sweep_.more_gradients[i - 1]; }

  void load_copies(std::uint32_t operands) {
    for (int k = 0; k < sweep_.n_operands; ++k) {
      if (!(copied_ & operands & 1u << k)) continue;
      codec<T>(sweep_.operands[k].format, Formats{}).load(sweep_, sweep_.operands[k], tile_.begin, tile_.size, copies_[k]);
    }
  }

  void store_copies(std::uint32_t operands) {
    for (int k = 0; k < sweep_.n_operands; ++k) {
      if (!(copied_ & operands & 1u << k)) continue;
      codec<T>(sweep_.operands[k].format, Formats{}).store(sweep_, sweep_.operands[k], tile_.begin, tile_.size, copies_[k]);
    }
  }

  // scratch <- w_1 g_1 + w_2 g_2 + ...
  void weigh() {
    for (int i = 0; i <= sweep_.n_more_gradients; ++i) {
      const T* g = in_place<T>(gradient(i), tile_.begin);
      if (!g) {
        codec<T>(gradient(i).format, Formats{}).load(sweep_, gradient(i), tile_.begin, tile_.size, copies_[1]);
        g = copies_[1];
      }
      const T weight = T(pipeline_.weights[i]);
      T* sum = scratch_;
      if (i == 0) {
        for_each(tile_.size, tile_.ahead, [=](std::int64_t j) GRADSTEP_INLINE_LAMBDA { sum[j] = weight * g[j]; }, g);
      } else {
        for_each(tile_.size, tile_.ahead, [=](std::int64_t j) GRADSTEP_INLINE_LAMBDA { sum[j] += weight * g[j]; }, g);
      }
    }
    tile_.grad = scratch_;
  }

  void zero_gradients(std::int64_t begin, std::int64_t size) {
    for (int i = 0; i <= sweep_.n_more_gradients; ++i) {
      T* g = in_place<T>(gradient(i), begin);
      T* zeros = g ? g : copies_[1];
      for_each(size, 0, [=](std::int64_t j) GRADSTEP_INLINE_LAMBDA { zeros[j] = T(0); }, zeros);
      if (!g) codec<T>(gradient(i).format, Formats{}).store(sweep_, gradient(i), begin, size, zeros);
    }
  }

  const Work& work_;
  const Sweep& sweep_;
  const Pipeline& pipeline_;
  const std::int64_t block_ = sweep_.block();
  Tile<T> tile_{};
  T* gradient_ = nullptr;
  T** slots_[kMaxOperands];  // where the tile has each operand
  T* in_place_[kMaxOperands];  // null: the operand is copied
  std::uint32_t copied_ = 0;  // those that are, a bit each
  RowValues row_values_[kMaxRows];
  RowSums row_sums_[kMaxRows];
  // Not at a distance of a whole page from each other: a load right after a store at such a distance waits for it.
  static constexpr std::int64_t kApart = kTile + 64 / static_cast<std::int64_t>(sizeof(T));
  alignas(64) T copies_[kMaxOperands][kApart];
  alignas(64) T scratch_[kApart];
  alignas(64) T update_[kApart];
};

template <class T>
GRADSTEP_NOINLINE void sweep_in_tiles(const Work& work, std::int64_t begin, std::int64_t end, bool prefetch) {
  Carrier<T> carrier(work, prefetch);
  const Sweep& sweep = *work.sweep;
  if (work.pipeline->by_row) {
    // Pieces begin with a block, and rows of two blocks do not mix.
    const std::int64_t group = sweep.group(), block = sweep.block();
    while (begin < end) {
      const std::int64_t next = std::min({begin + group, (begin / block + 1) * block, end});
      carrier.rows(begin, next);
      begin = next;
    }
    return;
  }
  // Leaves of sums stand where they have to. Other tiles begin where cache lines do.
  const Pass& pass = work.pipeline->passes[0];
  if (!work.sums && !sweep.operands[0].strides) {
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
  bool direct = !pipeline.in_tiles && !work.sums;
  for (int k = 0; k < sweep.n_operands; ++k) direct = direct && !sweep.operands[k].strides;
  if (!direct) return sweep_in_tiles<T>(work, begin, end, prefetch);

  Tile<T> tile{};
  tile.param = in_place<T>(sweep.operands[0], begin);
  tile.grad = in_place<T>(sweep.operands[1], begin);
  for (int k = 0; k < sweep.n_states; ++k) tile.states[k] = in_place<T>(sweep.operands[2 + k], begin);
  tile.begin = begin;
  tile.size = end - begin;
  tile.ahead = prefetch ? kAhead : 0;
  tile.scale = T(pipeline.scale);
  tile.gradient_factor = T(work.factors.gradient);
  tile.decayed_factor = T(work.factors.decayed);
  tile.trust_factor = T(work.factors.trust);
  run(pipeline, pipeline.passes[0], tile);
}

}  // namespace
}  // namespace gradstep::cpu
