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

template <class T>
GRADSTEP_HD void fill_factors(const Work& work, Tile<T>& tile) {
  tile.scale = T(work.pipeline->scale);
  tile.gradient_factor = T(work.factors.gradient);
  tile.decayed_factor = T(work.factors.decayed);
  tile.cautious_factor = T(work.factors.cautious);
  tile.trust_factor = T(work.factors.trust);
}

template <class T>
GRADSTEP_HD void run(const Pipeline& pipeline, int first, int last, Tile<T>& tile) {
  for (int i = first; i < last; ++i) pipeline.operations[i](pipeline.constants[i], &tile);
}

// What belongs to one thread while it carries tiles through a pipeline.
template <class T>
class Carrier {
 public:
  Carrier(const Work& work, bool prefetch) : work_(work), sweep_(*work.sweep), pipeline_(*work.pipeline), prefetch_(prefetch) {}

  // Carries elements [begin, end), a tile at most, through a pass.
  void tile(const Pass& pass, std::int64_t begin, std::int64_t end) {
    const std::int64_t size = end - begin;
    T* at[kMaxOperands] = {};
    for (int k = 0; k < sweep_.n_operands; ++k) {
      if (!(pass.loads >> k & 1)) continue;
      const Operand& operand = sweep_.operands[k];
      at[k] = in_place<T>(operand, begin);
      if (at[k]) continue;
      at[k] = copies_[k];
      if (k == 1 && pipeline_.weights) continue;  // read below
      codec<T>(operand.format, Formats{}).load(sweep_, operand, begin, size, at[k]);
    }
    Tile<T> tile{};
    tile.param = at[0];
    tile.grad = at[1];
    for (int k = 0; k < sweep_.n_states; ++k) tile.states[k] = at[2 + k];
    for (int extra = 0, k = 2 + sweep_.n_states; extra < kMaxExtras; ++extra) {
      if (sweep_.extras >> extra & 1) tile.extras[extra] = at[k++];
    }
    tile.scratch = scratch_;
    tile.update = update_;
    tile.begin = begin;
    tile.size = size;
    tile.prefetch = prefetch_;
    fill_factors(work_, tile);
    tile.row_factor = T(row_.factor);
    tile.row_mean = T(row_.mean);
    tile.sums = work_.sums ? work_.sums + begin / block_ : nullptr;
    tile.row_sums = row_sums_;
    if (pipeline_.weights && pass.loads & 2) weigh(tile);

    run(pipeline_, pass.begin, pass.end, tile);

    for (int k = 0; k < sweep_.n_operands; ++k) {
      const Operand& operand = sweep_.operands[k];
      if (pass.stores >> k & 1 && at[k] == copies_[k])
        codec<T>(operand.format, Formats{}).store(sweep_, operand, begin, size, at[k]);
    }
    if (pipeline_.zeroes_gradient && &pass == &pipeline_.passes[pipeline_.n_passes - 1]) zero_gradients(begin, size);
  }

  void row(std::int64_t begin, std::int64_t end) {
    row_ = {};
    for (int p = 0; p < pipeline_.n_passes; ++p) {
      const Pass& pass = pipeline_.passes[p];
      for (double& sum : row_sums_) sum = 0;
      for (std::int64_t at = begin; at < end; at += kTile) tile(pass, at, std::min(at + kTile, end));
      if (!pass.finish) continue;
      row_ = pass.finish(pipeline_.constants[pass.finish_constants], row_sums_, end - begin, work_.factors.gradient);
    }
  }

 private:
  const Operand& gradient(int i) const { return i == 0 ? sweep_.operands[1] : sweep_.more_gradients[i - 1]; }

  // scratch <- w_1 g_1 + w_2 g_2 + ...
  void weigh(Tile<T>& tile) {
    for (int i = 0; i <= sweep_.n_more_gradients; ++i) {
      const T* g = in_place<T>(gradient(i), tile.begin);
      if (!g) {
        codec<T>(gradient(i).format, Formats{}).load(sweep_, gradient(i), tile.begin, tile.size, copies_[1]);
        g = copies_[1];
      }
      const T weight = T(pipeline_.weights[i]);
      T* sum = scratch_;
      if (i == 0) {
        for_each(tile.size, tile.prefetch, [=](std::int64_t j) GRADSTEP_INLINE_LAMBDA { sum[j] = weight * g[j]; }, g);
      } else {
        for_each(tile.size, tile.prefetch, [=](std::int64_t j) GRADSTEP_INLINE_LAMBDA { sum[j] += weight * g[j]; }, g);
      }
    }
    tile.grad = scratch_;
  }

  void zero_gradients(std::int64_t begin, std::int64_t size) {
    for (int i = 0; i <= sweep_.n_more_gradients; ++i) {
      T* g = in_place<T>(gradient(i), begin);
      T* zeros = g ? g : copies_[1];
      for_each(size, false, [=](std::int64_t j) GRADSTEP_INLINE_LAMBDA { zeros[j] = T(0); }, zeros);
      if (!g) codec<T>(gradient(i).format, Formats{}).store(sweep_, gradient(i), begin, size, zeros);
    }
  }

  const Work& work_;
  const Sweep& sweep_;
  const Pipeline& pipeline_;
  const bool prefetch_;
  const std::int64_t block_ = sweep_.block();
  RowValues row_;
  double row_sums_[kRowSums];
  // Not at a distance of a whole page from each other: a load right after a store at such a distance waits for it.
  static constexpr std::int64_t kApart = kTile + 64 / static_cast<std::int64_t>(sizeof(T));
  alignas(64) T copies_[kMaxOperands][kApart];
  alignas(64) T scratch_[kApart];
  alignas(64) T update_[kApart];
};

template <class T>
GRADSTEP_NOINLINE void sweep_in_tiles(const Work& work, std::int64_t begin, std::int64_t end, bool prefetch) {
  Carrier<T> carrier(work, prefetch);
  if (work.pipeline->by_row) {
    const std::int64_t row = work.sweep->row;
    for (; begin < end; begin += row) carrier.row(begin, begin + row);
  } else {
    for (; begin < end; begin += kTile) carrier.tile(work.pipeline->passes[0], begin, std::min(begin + kTile, end));
  }
}

template <class T>
void sweep(const Work& work, std::int64_t begin, std::int64_t end, bool prefetch) {
  const Sweep& sweep = *work.sweep;
  const Pipeline& pipeline = *work.pipeline;
  bool direct = !pipeline.in_tiles;
  for (int k = 0; k < sweep.n_operands; ++k) direct = direct && !sweep.operands[k].strides;
  if (!direct) return sweep_in_tiles<T>(work, begin, end, prefetch);

  Tile<T> tile{};
  tile.param = in_place<T>(sweep.operands[0], begin);
  tile.grad = in_place<T>(sweep.operands[1], begin);
  for (int k = 0; k < sweep.n_states; ++k) tile.states[k] = in_place<T>(sweep.operands[2 + k], begin);
  tile.begin = begin;
  tile.size = end - begin;
  tile.prefetch = prefetch;
  fill_factors(work, tile);
  run(pipeline, 0, pipeline.size, tile);
}

}  // namespace
}  // namespace gradstep::cpu
