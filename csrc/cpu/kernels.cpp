// Every loop over elements on the CPU. Compiled once per instruction set, with GRADSTEP_ISA naming it: nothing but the one
// accessor at the end has external linkage, so that the linker can't mix the objects.
#include "kernels.h"

#include <algorithm>
#include <type_traits>
#include <utility>

namespace gradstep::cpu {
namespace {

// ---- rules and stages over a tile -----------------------------------------------------------------------------------------

// Elements to go until `at` stands at the beginning of a cache line.
template <class T>
GRADSTEP_HD std::int64_t to_next_line(const T* at) {
  const auto past = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(at) % 64 / sizeof(T));
  return past == 0 ? 0 : static_cast<std::int64_t>(64 / sizeof(T)) - past;
}

// A loop over elements, in blocks of a few vectors that begin where a cache line of the first operand does: NumPy's large
// arrays begin 16 bytes past one, and so do their like, and a vector that spans two lines costs twice.
//
// Where operands come from memory, each block first asks for one that lies ahead: the processor's own prefetchers fall behind a
// loop with a square root and a division in it. (AdamW, float32, 48M elements, one thread: 57 GB/s instead of 46; but in the
// caches the hints only cost, 20 to 30 %.)
template <class T, class Element, class First, class... Operand>
GRADSTEP_HD void for_each(const Tile<T>& tile, Element element, const First* first, const Operand*... operands) {
  constexpr std::int64_t kBlock = 64, kAhead = 512;
  const std::int64_t size = tile.size, head = to_next_line(first);
  const bool ahead = tile.prefetch;
  std::int64_t i = head < size ? head : size;
  GRADSTEP_INDEPENDENT
  for (std::int64_t j = 0; j < i; ++j) element(j);
  for (; i + kBlock <= size; i += kBlock) {
    if (ahead) {
      prefetch<kBlock * sizeof(T)>(first + i + kAhead);
      (prefetch<kBlock * sizeof(T)>(operands + i + kAhead), ...);
    }
    GRADSTEP_INDEPENDENT
    for (std::int64_t j = 0; j < kBlock; ++j) element(i + j);  // from 0: so compilers see how many there are
  }
  GRADSTEP_INDEPENDENT
  for (std::int64_t j = i; j < size; ++j) element(j);
}

template <class T, class Update, class DecayOp, class... States>
GRADSTEP_HD void update_loop(const Tile<T>& tile, const Update update, const DecayOp decay, T* p, const T* g, States*... s) {
  for_each(
      tile,
      [=](std::int64_t i)
          GRADSTEP_INLINE_LAMBDA { p[i] -= decay.total(update(p[i], decay.gradient(g[i], p[i]), s[i]...), p[i]); },
      p, g, s...);
}

// The rule's operator for this step: its `First`, if it has one and this is the first.
template <class Rule, class T, bool kFirst>
GRADSTEP_HD auto operator_of(const typename Rule::template Update<T>& update) {
  if constexpr (kFirst) return typename Rule::template First<T>(update);
  else return update;
}

template <class Rule, class T, class DecayStage, bool kFirst>
void update(const std::byte* constants, void* erased) {
  const auto& tile = *static_cast<Tile<T>*>(erased);
  const auto& [update, decay] =
      *reinterpret_cast<const Decayed<typename Rule::template Update<T>, typename DecayStage::template Op<T>>*>(constants);
  const auto first_or_later = operator_of<Rule, T, kFirst>(update);
  [&, decay = decay]<std::size_t... k>(std::index_sequence<k...>) {
    update_loop(tile, first_or_later, decay, tile.param, tile.grad, tile.states[k]...);
  }(std::make_index_sequence<Rule::states.size()>());
}

template <class Stage, class T>
void gradient_stage(const std::byte* constants, void* erased) {
  auto& tile = *static_cast<Tile<T>*>(erased);
  const auto op = *reinterpret_cast<const typename Stage::template Op<T>*>(constants);
  const T *p = tile.param, *g = tile.grad;
  T* out = tile.scratch;
  for_each(tile, [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA { out[i] = op(g[i], p[i]); }, p, g);
  tile.grad = out;
}

// The access pattern of a rule with `kStates` states without its math: reads every operand and writes back what it has read.
// How fast that goes is the limit of any rule; benchmarks quote the share of it. The constants hold a zero that the compiler
// can't see.
template <class T, std::size_t kStates>
void touch(const std::byte* constants, void* erased) {
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  const auto& tile = *static_cast<Tile<T>*>(erased);
  const Bits zero = *reinterpret_cast<const Bits*>(constants);
  [&]<std::size_t... k>(std::index_sequence<k...>) {
    const auto loop = [&](Bits* p, const Bits* g, auto*... s) {
      const auto element = [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA {
        const Bits x = g[i] & zero;
        p[i] ^= x;
        ((s[i] ^= x), ...);
      };
      for_each(tile, element, p, g, s...);
    };
    loop(reinterpret_cast<Bits*>(tile.param), reinterpret_cast<const Bits*>(tile.grad),
         reinterpret_cast<Bits*>(tile.states[k])...);
  }(std::make_index_sequence<kStates>());
}

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

// ---- the pipeline ---------------------------------------------------------------------------------------------------------

template <class T>
GRADSTEP_HD void run(const Pipeline& pipeline, Tile<T>& tile) {
  for (int i = 0; i < pipeline.size; ++i) pipeline.operations[i](pipeline.constants[i], &tile);
}

template <class T>
GRADSTEP_HD T* in_place(const Operand& operand, std::int64_t begin) {
  return operand.strides ? nullptr : reinterpret_cast<T*>(operand.data) + begin;
}

template <class T>
GRADSTEP_NOINLINE void sweep_in_tiles(const Sweep& sweep, const Pipeline& pipeline, std::int64_t begin, std::int64_t end,
                                      bool prefetch) {
  alignas(64) T scratch[1 + kMaxOperands][kTile];
  const int n = sweep.n_operands;
  for (; begin < end; begin += kTile) {
    const std::int64_t size = std::min(kTile, end - begin);
    T* at[kMaxOperands] = {};
    for (int k = 0; k < n; ++k) {
      const Operand& operand = sweep.operands[k];
      at[k] = in_place<T>(operand, begin);
      if (at[k]) continue;
      at[k] = scratch[k];
      codec<T>(operand.format, Formats{}).load(sweep, operand, begin, size, at[k]);
    }
    Tile<T> tile{at[0], at[1], scratch[kMaxOperands], {}, size, prefetch};
    for (int k = 2; k < n; ++k) tile.states[k - 2] = at[k];
    run(pipeline, tile);
    for (int k = 0; k < n; ++k) {
      const Operand& operand = sweep.operands[k];
      if (k != 1 && at[k] == scratch[k]) codec<T>(operand.format, Formats{}).store(sweep, operand, begin, size, at[k]);
    }
  }
}

template <class T>
void sweep(const Sweep& sweep, const Pipeline& pipeline, std::int64_t begin, std::int64_t end, bool prefetch) {
  bool direct = !pipeline.needs_scratch;
  for (int k = 0; k < sweep.n_operands; ++k) direct = direct && !sweep.operands[k].strides;
  if (!direct) return sweep_in_tiles<T>(sweep, pipeline, begin, end, prefetch);

  Tile<T> tile{
      in_place<T>(sweep.operands[0], begin), in_place<T>(sweep.operands[1], begin), nullptr, {}, end - begin, prefetch};
  for (int k = 2; k < sweep.n_operands; ++k) tile.states[k - 2] = in_place<T>(sweep.operands[k], begin);
  run(pipeline, tile);
}

// ---- the table ------------------------------------------------------------------------------------------------------------

template <class Rule, class T, class... DecayStage>
constexpr void fill_updates(Operation (&updates)[kDecays][2], List<DecayStage...>) {
  int decay = 0;
  ((updates[decay][0] = update<Rule, T, DecayStage, false>, updates[decay][1] = update<Rule, T, DecayStage, HasFirst<Rule>>,
    ++decay),
   ...);
}

template <class T, class... Rule, class... Stage, std::size_t... kStates>
constexpr TypedKernels typed(List<Rule...>, List<Stage...>, std::index_sequence<kStates...>) {
  TypedKernels kernels{{}, {gradient_stage<Stage, T>...}, {touch<T, kStates>...}, sweep<T>};
  int rule = 0;
  (fill_updates<Rule, T>(kernels.update[rule++], Decays{}), ...);
  return kernels;
}

constexpr auto kStateCounts = std::make_index_sequence<kMaxStates + 1>();
constexpr Kernels kKernels{typed<float>(Rules{}, GradientStages{}, kStateCounts),
                           typed<double>(Rules{}, GradientStages{}, kStateCounts)};

}  // namespace

#define GRADSTEP_JOIN(a, b) a##b
#define GRADSTEP_ACCESSOR(isa) GRADSTEP_JOIN(kernels_, isa)

const Kernels& GRADSTEP_ACCESSOR(GRADSTEP_ISA)();
const Kernels& GRADSTEP_ACCESSOR(GRADSTEP_ISA)() { return kKernels; }

}  // namespace gradstep::cpu
