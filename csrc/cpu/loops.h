// Every loop over the elements of a tile. Included by kernels.cpp alone, once per instruction set: all of it has internal
// linkage.
#pragma once

#include <bit>
#include <type_traits>
#include <utility>

#include "../core/formats.h"
#include "../core/random.h"
#include "kernels.h"

namespace gradstep::cpu {
namespace {

// Elements to go until `at` stands at the beginning of a cache line.
template <class T>
GRADSTEP_HD std::int64_t to_next_line(const T* at) {
  const auto past = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(at) % 64 / sizeof(T));
  return past == 0 ? 0 : static_cast<std::int64_t>(64 / sizeof(T)) - past;
}

// How many elements ahead memory is asked for the operands of a loop, 0 if they are in the caches; those that are there while
// others are not, by a bit each.
struct Ahead {
  std::int64_t by;
  std::uint32_t in_caches = 0;
};

// A loop over elements, in blocks of a few vectors that begin where a cache line of the first operand does: NumPy's large
// arrays begin 16 bytes past one, and so do their like, and a vector that spans two lines costs twice.
//
// Where operands come from memory, each block first asks for the one that lies `ahead` elements further on: the processor's own
// prefetchers fall behind a loop with a square root and a division in it. (AdamW, float32, 48M elements, one thread: 57 GB/s
// instead of 46; but in the caches the hints only cost, 20 to 30 %.)
template <class Element, class First, class... Operand>
GRADSTEP_HD void for_each(std::int64_t size, Ahead ahead, Element element, const First* first, const Operand*... operands) {
  constexpr std::int64_t kBlock = 64;
  const std::int64_t head = to_next_line(first);
  std::int64_t i = head < size ? head : size;
  GRADSTEP_INDEPENDENT
  for (std::int64_t j = 0; j < i; ++j) element(j);
  for (; i + kBlock <= size; i += kBlock) {
    if (ahead.by) {
      std::uint32_t there = ahead.in_caches;
      const auto ask = [&]<class Stored>(const Stored* at) GRADSTEP_INLINE_LAMBDA {
        if (!(there & 1)) prefetch<kBlock * sizeof(Stored)>(at + i + ahead.by);
        there >>= 1;
      };
      ask(first);
      (ask(operands), ...);
    }
    GRADSTEP_INDEPENDENT
    for (std::int64_t j = 0; j < kBlock; ++j) element(i + j);  // from 0: so compilers see how many there are
  }
  GRADSTEP_INDEPENDENT
  for (std::int64_t j = i; j < size; ++j) element(j);
}

template <class T>
GRADSTEP_HD Tile<T>& tile_of(void* erased) {
  return *static_cast<Tile<T>*>(erased);
}

template <class Constants>
GRADSTEP_HD Constants constants_of(const std::byte* constants) {
  return *reinterpret_cast<const Constants*>(constants);
}

// ---- rules ----------------------------------------------------------------------------------------------------------------

// The rule's operator for this step: its `First`, if it has one and this is the first.
template <class Rule, class T, bool kFirst>
GRADSTEP_HD auto operator_of(const typename Rule::template Update<T>& update) {
  if constexpr (kFirst) return typename Rule::template First<T>(update);
  else return update;
}

// An element as it stands in memory: a number of the compute type, or one of bfloat16, which costs nothing beside a square
// root.
struct Brain {
  std::uint16_t bits;
};
template <class T>
GRADSTEP_HD T get(const T& at) {
  return at;
}
GRADSTEP_HD float get(const Brain& at) { return BFloat16::decode<float>(at.bits); }
template <class T>
GRADSTEP_HD void put(T& at, T x) {
  at = x;
}
GRADSTEP_HD void put(Brain& at, float x) { at.bits = BFloat16::encode(x); }

template <class T, class Update, class DecayOp, class P, class G, class... States>
GRADSTEP_HD void update_loop(const Tile<T>& tile, const Update update, const DecayOp decay, P* p, const G* g, States*... s) {
  const T scale = tile.scale, factor = tile.gradient_factor, decayed = tile.decayed_factor, trust = tile.trust_factor;
  for_each(
      tile.size, Ahead{tile.ahead, tile.copied},
      [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA {
        [&](T param, auto... states) GRADSTEP_INLINE_LAMBDA {
          const T gradient = decay.gradient(scaled_gradient(get(g[i]), scale, factor), param, decayed);
          put(p[i], T(param - trust * decay.total(update(param, gradient, states...), param)));
          (put(s[i], states), ...);
        }(get(p[i]), get(s[i])...);
      },
      p, g, s...);
}

// Straight to the parameter. Factors that are 1 change nothing, not even a bit, and cost nothing that can be measured. `P`, `G`
// and `S` are what parameter, gradient and states are in memory.
template <class Rule, class T, class DecayStage, bool kFirst, class P = T, class G = T, class S = T>
void update(const std::byte* constants, void* erased) {
  const auto& tile = tile_of<T>(erased);
  const auto& [update, decay] =
      *reinterpret_cast<const Decayed<typename Rule::template Update<T>, typename DecayStage::template Op<T>>*>(constants);
  const auto first_or_later = operator_of<Rule, T, kFirst>(update);
  [&, decay = decay]<std::size_t... k>(std::index_sequence<k...>) {
    update_loop(tile, first_or_later, decay, reinterpret_cast<P*>(tile.param), reinterpret_cast<const G*>(tile.grad),
                reinterpret_cast<S*>(tile.states[k])...);
  }(std::make_index_sequence<Rule::states.size()>());
}

template <bool kDry, class T, class Update, class DecayOp, class... States>
GRADSTEP_HD void direction_loop(const Tile<T>& tile, const Update update, const DecayOp decay, const T* p, const T* g, T* u,
                                States*... s) {
  const T trust = tile.trust_factor;
  for_each(
      tile.size, Ahead{tile.ahead},
      [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA {
        if constexpr (kDry) {
          u[i] = trust * [&](auto... copies)
                             GRADSTEP_INLINE_LAMBDA { return decay.total(update(p[i], g[i], copies...), p[i]); }(s[i]...);
        } else {
          u[i] = trust * decay.total(update(p[i], g[i], s[i]...), p[i]);
        }
      },
      p, s...);
}

// To the tile's update; dry, the states stay as they are.
template <class Rule, class T, class DecayStage, bool kDry, bool kFirst>
void direction(const std::byte* constants, void* erased) {
  const auto& tile = tile_of<T>(erased);
  const auto& [update, decay] =
      *reinterpret_cast<const Decayed<typename Rule::template Update<T>, typename DecayStage::template Op<T>>*>(constants);
  const auto first_or_later = operator_of<Rule, T, kFirst>(update);
  [&, decay = decay]<std::size_t... k>(std::index_sequence<k...>) {
    direction_loop<kDry>(tile, first_or_later, decay, static_cast<const T*>(tile.param), tile.grad, tile.update,
                         tile.states[k]...);
  }(std::make_index_sequence<Rule::states.size()>());
}

// ---- stages of the gradient -----------------------------------------------------------------------------------------------

template <class T>
void multiply_factors(const std::byte*, void* erased) {
  auto& tile = tile_of<T>(erased);
  const T scale = std::exchange(tile.scale, T(1)), factor = std::exchange(tile.gradient_factor, T(1));
  const T* g = tile.grad;
  T* out = tile.scratch;
  for_each(
      tile.size, Ahead{tile.ahead},
      [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA { out[i] = scaled_gradient(g[i], scale, factor); }, g);
  tile.grad = out;
}

// The other stages find the gradient in the tile's scratch already, and change it there.
template <class T, class Element>
GRADSTEP_HD void for_each_gradient(Tile<T>& tile, Element element) {
  T* g = tile.scratch;
  for_each(tile.size, Ahead{0}, [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA { g[i] = element(g[i]); }, g);
}

template <class Stage, class T>
void gradient_stage(const std::byte* constants, void* erased) {
  const auto op = constants_of<typename Stage::template Op<T>>(constants);
  for_each_gradient(tile_of<T>(erased), [=](T g) GRADSTEP_INLINE_LAMBDA { return op(g); });
}

// Changes elements of `x`, which stands in the caches, by what is known of their row.
template <class T, class Element>
GRADSTEP_HD void for_each_in_rows(const Tile<T>& tile, T* x, Element element) {
  const RowValues* values = tile.row_values;
  for (std::int64_t begin = 0; begin < tile.size; begin += tile.row, ++values) {
    const T factor = T(values->factor), mean = T(values->mean);
    T* row = x + begin;
    for_each(tile.row, Ahead{0}, [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA { row[i] = element(row[i], factor, mean); }, row);
  }
}

template <class T>
void scale_row(const std::byte*, void* erased) {
  auto& tile = tile_of<T>(erased);
  for_each_in_rows(tile, tile.scratch, [](T g, T factor, T) GRADSTEP_INLINE_LAMBDA { return factor * g; });
}

template <class T>
void centralize(const std::byte*, void* erased) {
  auto& tile = tile_of<T>(erased);
  for_each_in_rows(tile, tile.scratch, [](T g, T, T mean) GRADSTEP_INLINE_LAMBDA { return g - mean; });
}

template <class T>
void noise(const std::byte* constants, void* erased) {
  auto& tile = tile_of<T>(erased);
  const auto [sigma, seed, stream, step] = constants_of<NoiseConstants>(constants);
  const Normal normal{{{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}}, stream, step};
  const T deviation = T(sigma);
  double z[4] = {};
  for (std::int64_t i = 0; i < tile.size; ++i) {
    const auto at = static_cast<std::uint64_t>(tile.begin + i);
    if (i == 0 || at % 4 == 0) normal(at / 4, z);
    tile.scratch[i] += deviation * T(z[at % 4]);
  }
}

template <class T>
void couple(const std::byte* constants, void* erased) {
  auto& tile = tile_of<T>(erased);
  const auto op = constants_of<typename CoupledDecay::template Op<T>>(constants);
  const T factor = tile.decayed_factor;
  const T *g = tile.grad, *p = tile.param;
  T* out = tile.scratch;
  for_each(
      tile.size, Ahead{tile.ahead}, [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA { out[i] = op.gradient(g[i], p[i], factor); },
      p);
  tile.grad = out;
}

// ---- stages of the update -------------------------------------------------------------------------------------------------

template <class T>
void cautious(const std::byte*, void* erased) {
  auto& tile = tile_of<T>(erased);
  const T factor = tile.cautious_factor;
  const T* g = tile.grad;
  T* u = tile.update;
  for_each(tile.size, Ahead{0}, [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA { u[i] = cautious_update(u[i], g[i], factor); }, u);
}

template <class T>
void decay_update(const std::byte* constants, void* erased) {
  auto& tile = tile_of<T>(erased);
  const auto op = constants_of<typename DecoupledDecay::template Op<T>>(constants);
  const T* p = tile.param;
  T* u = tile.update;
  for_each(tile.size, Ahead{0}, [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA { u[i] = op.total(u[i], p[i]); }, u);
}

template <class T>
void trust(const std::byte*, void* erased) {
  auto& tile = tile_of<T>(erased);
  const T factor = tile.late_trust_factor;
  T* u = tile.update;
  for_each(tile.size, Ahead{0}, [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA { u[i] = factor * u[i]; }, u);
}

template <class T>
void apply(const std::byte*, void* erased) {
  auto& tile = tile_of<T>(erased);
  T* p = tile.param;
  const T* u = tile.update;
  for_each(tile.size, Ahead{0}, [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA { p[i] -= u[i]; }, p);
}

// ---- stages of the parameter ----------------------------------------------------------------------------------------------

template <class Stage, class T>
void param_stage(const std::byte* constants, void* erased) {
  const auto op = constants_of<typename Stage::template Op<T>>(constants);
  auto& tile = tile_of<T>(erased);
  T* p = tile.param;
  for_each(tile.size, Ahead{0}, [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA { p[i] = op(p[i]); }, p);
}

template <class T>
void scale_param_row(const std::byte*, void* erased) {
  auto& tile = tile_of<T>(erased);
  for_each_in_rows(tile, tile.param, [](T p, T factor, T) GRADSTEP_INLINE_LAMBDA { return factor * p; });
}

template <class T, Extra kExtra>
void average(const std::byte* constants, void* erased) {
  auto& tile = tile_of<T>(erased);
  const T weight = T(constants_of<double>(constants));
  const T* p = tile.param;
  T* a = tile.extras[kExtra];
  for_each(
      tile.size, Ahead{tile.ahead}, [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA { a[i] = averaged(a[i], p[i], weight); }, a);
}

template <class T>
void lookahead(const std::byte* constants, void* erased) {
  auto& tile = tile_of<T>(erased);
  const T weight = T(constants_of<double>(constants));
  T *p = tile.param, *slow = tile.extras[kSlow];
  for_each(
      tile.size, Ahead{tile.ahead},
      [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA {
        slow[i] = averaged(slow[i], p[i], weight);
        p[i] = slow[i];
      },
      slow);
}

// ---- arrays alone ---------------------------------------------------------------------------------------------------------

template <class T>
void scale(const std::byte*, void* erased) {
  auto& tile = tile_of<T>(erased);
  const T factor = tile.gradient_factor;
  T* p = tile.param;
  for_each(tile.size, Ahead{tile.ahead}, [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA { p[i] = factor * p[i]; }, p);
}

template <class T>
void swap(const std::byte*, void* erased) {
  auto& tile = tile_of<T>(erased);
  T *a = tile.param, *b = tile.states[0];
  for_each(
      tile.size, Ahead{tile.ahead},
      [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA {
        const T x = a[i];
        a[i] = b[i];
        b[i] = x;
      },
      a, b);
}

template <class T, bool kToState>
void copy(const std::byte*, void* erased) {
  auto& tile = tile_of<T>(erased);
  const T* from = kToState ? tile.param : tile.states[0];
  T* to = kToState ? tile.states[0] : tile.param;
  for_each(tile.size, Ahead{tile.ahead}, [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA { to[i] = from[i]; }, to);
}

// ---- sums -----------------------------------------------------------------------------------------------------------------

// Operands of a tile, as addends of a sum. Those that stand in the tile's scratch need not be asked for ahead.
template <class T>
GRADSTEP_HD Addend<T> gradient_of(const Tile<T>& tile) {
  return {tile.grad, tile.scale, tile.grad != tile.scratch ? tile.ahead : 0};
}
template <class T>
GRADSTEP_HD Addend<T> param_of(const Tile<T>& tile) {
  return {tile.param, T(1), tile.ahead};
}

template <class T>
void sum_grad(const std::byte*, void* erased) {
  const auto& tile = tile_of<T>(erased);
  add_leaves<Term::kSquare>(tile.sums->at[kGradSquares], tile.size, tile.row, gradient_of(tile));
}

template <class T>
void sum_param(const std::byte*, void* erased) {
  const auto& tile = tile_of<T>(erased);
  add_leaves<Term::kSquare>(tile.sums->at[kParamSquares], tile.size, tile.row, param_of(tile));
}

template <class T>
void sum_rule_grad(const std::byte*, void* erased) {
  const auto& tile = tile_of<T>(erased);
  add_leaves<Term::kSquare>(tile.sums->at[kRuleGradSquares], tile.size, tile.row, Addend<T>{tile.grad});
}

template <class T>
void sum_update(const std::byte*, void* erased) {
  const auto& tile = tile_of<T>(erased);
  add_leaves<Term::kSquare>(tile.sums->at[kUpdateSquares], tile.size, tile.row, Addend<T>{tile.update});
  // Memory idles while loops work on what is in the caches, unless one of them asks for a part of the next tile.
  const Addend<T> param{tile.param, T(1), tile.ahead > 0 ? kTile : 0};
  add_leaves<Term::kSquare>(tile.sums->at[kParamSquares], tile.size, tile.row, param);
}

// Counts compare bit patterns, as integers, so that compilers see that any order will do.
template <class T>
void count_grad(const std::byte*, void* erased) {
  using Bits = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  constexpr Bits kInfinity = sizeof(T) == 4 ? Bits(0x7f800000) : static_cast<Bits>(0x7ff0000000000000);
  constexpr Bits kMagnitude = static_cast<Bits>(~(Bits{1} << (8 * sizeof(T) - 1)));
  const auto& tile = tile_of<T>(erased);
  add_leaves<Term::kSquare>(tile.sums->at[kCameSquares], tile.size, tile.row, gradient_of(tile));

  const T scale = tile.scale;
  const T* g = tile.grad;
  Bits largest = 0, nans = 0, infs = 0, zeros = 0;
  for (std::int64_t i = 0; i < tile.size; ++i) {
    const Bits x = std::bit_cast<Bits>(scale * g[i]) & kMagnitude;
    largest = x > largest ? x : largest;
    zeros += x == 0;
  }
  for (std::int64_t i = 0; largest >= kInfinity && i < tile.size; ++i) {
    const Bits x = std::bit_cast<Bits>(scale * g[i]) & kMagnitude;
    nans += x > kInfinity;
    infs += x == kInfinity;
  }
  Sums here;
  here.at[kMaxAbs] = static_cast<double>(std::bit_cast<T>(largest));
  here.at[kNans] = static_cast<double>(nans);
  here.at[kInfs] = static_cast<double>(infs);
  here.at[kZeros] = static_cast<double>(zeros);
  tile.sums->add(here);
}

template <class T>
void count_agreeing(const std::byte*, void* erased) {
  using Bits = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  auto& tile = tile_of<T>(erased);
  const T *u = tile.update, *g = tile.grad;
  Bits count = 0;
  for (std::int64_t i = 0; i < tile.size; ++i) count += agree(u[i], g[i]) ? 1 : 0;
  tile.sums->at[kAgreeing] += static_cast<double>(count);
}

// Adds a leaf to each row's sum.
template <Term kTerm, class T>
GRADSTEP_HD void add_rows(const Tile<T>& tile, double RowSums::* sum, const Addend<T> x) {
  RowSums* sums = tile.row_sums;
  for (std::int64_t begin = 0; begin < tile.size; begin += tile.row, ++sums) {
    const Addend<T> row{x.at + begin, x.scale, x.ahead};
    sums->*sum += tile.row <= 8 ? short_leaf_sum<kTerm>(tile.row, row) : leaf_sum<kTerm>(tile.row, row);
  }
}

template <class T>
void sum_row(const std::byte*, void* erased) {
  const auto& tile = tile_of<T>(erased);
  add_rows<Term::kElement>(tile, &RowSums::grad, gradient_of(tile));
}

template <class T>
void sum_row_squares(const std::byte*, void* erased) {
  const auto& tile = tile_of<T>(erased);
  add_rows<Term::kSquare>(tile, &RowSums::grad_squares, gradient_of(tile));
  add_rows<Term::kSquare>(tile, &RowSums::param_squares, param_of(tile));
}

template <class T>
void sum_param_row(const std::byte*, void* erased) {
  const auto& tile = tile_of<T>(erased);
  add_rows<Term::kSquare>(tile, &RowSums::param_squares, Addend<T>{tile.param});
}

// ---- for benchmarks -------------------------------------------------------------------------------------------------------

// The access pattern of a rule with `kStates` states without its math: reads every operand and writes back what it has read.
// How fast that goes is the limit of any rule; benchmarks quote the share of it. The constants hold a zero that the compiler
// can't see.
template <class T, std::size_t kStates>
void touch(const std::byte* constants, void* erased) {
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  const auto& tile = tile_of<T>(erased);
  const Bits zero = *reinterpret_cast<const Bits*>(constants);
  [&]<std::size_t... k>(std::index_sequence<k...>) {
    const auto loop = [&](Bits* p, const Bits* g, auto*... s) {
      const auto element = [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA {
        const Bits x = g[i] & zero;
        p[i] ^= x;
        ((s[i] ^= x), ...);
      };
      for_each(tile.size, Ahead{tile.ahead}, element, p, g, s...);
    };
    loop(reinterpret_cast<Bits*>(tile.param), reinterpret_cast<const Bits*>(tile.grad),
         reinterpret_cast<Bits*>(tile.states[k])...);
  }(std::make_index_sequence<kStates>());
}

}  // namespace
}  // namespace gradstep::cpu
