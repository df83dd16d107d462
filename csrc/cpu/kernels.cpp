// The loops over elements on the CPU. Compiled once per instruction set, with GRADSTEP_ISA naming it: nothing but the one
// accessor at the end has external linkage, so that the linker can't mix the objects.
#include "kernels.h"

#include "loops.h"
#include "tiles.h"

namespace gradstep::cpu {
namespace {

template <class Rule, class T, class P, class G, class S, class... DecayStage>
constexpr void fill_updates(Function (&updates)[kDecays][2], List<DecayStage...>) {
  int decay = 0;
  ((updates[decay][0] = update<Rule, T, DecayStage, false, P, G, S>,
    updates[decay][1] = update<Rule, T, DecayStage, HasFirst<Rule>, P, G, S>, ++decay),
   ...);
}

// In the order of Brains.
template <class Rule, class T>
constexpr void fill_updates(TypedKernels& kernels, int rule) {
  fill_updates<Rule, T, T, T, T>(kernels.update[0][rule], Decays{});
  if constexpr (sizeof(T) == sizeof(float)) {
    fill_updates<Rule, T, Brain, Brain, Brain>(kernels.update[1][rule], Decays{});
    fill_updates<Rule, T, Brain, Brain, T>(kernels.update[2][rule], Decays{});
    fill_updates<Rule, T, T, T, Brain>(kernels.update[3][rule], Decays{});
    fill_updates<Rule, T, T, Brain, T>(kernels.update[4][rule], Decays{});
    fill_updates<Rule, T, T, Brain, Brain>(kernels.update[5][rule], Decays{});
  }
}

template <class Rule, class T, class DecayStage>
constexpr void fill_directions(Function (&directions)[2][2]) {
  directions[0][0] = direction<Rule, T, DecayStage, false, false>;
  directions[0][1] = direction<Rule, T, DecayStage, false, HasFirst<Rule>>;
  directions[1][0] = direction<Rule, T, DecayStage, true, false>;
  directions[1][1] = direction<Rule, T, DecayStage, true, HasFirst<Rule>>;
}

template <class T>
constexpr void fill_loops(Function (&loops)[static_cast<int>(Loop::kLoops)]) {
  const auto set = [&](Loop loop, Function function) { loops[static_cast<int>(loop)] = function; };
  set(Loop::kFactors, multiply_factors<T>);
  set(Loop::kScaleRow, scale_row<T>);
  set(Loop::kCentralize, centralize<T>);
  set(Loop::kNoise, noise<T>);
  set(Loop::kCouple, couple<T>);
  set(Loop::kCautious, cautious<T>);
  set(Loop::kDecay, decay_update<T>);
  set(Loop::kTrust, trust<T>);
  set(Loop::kApply, apply<T>);
  set(Loop::kScaleParamRow, scale_param_row<T>);
  set(Loop::kEma, average<T, kEma>);
  set(Loop::kSwa, average<T, kSwa>);
  set(Loop::kLookahead, lookahead<T>);
  set(Loop::kScale, scale<T>);
  set(Loop::kSwap, swap<T>);
  set(Loop::kCopyTo, copy<T, true>);
  set(Loop::kCopyFrom, copy<T, false>);
  set(Loop::kSumGrad, sum_grad<T>);
  set(Loop::kSumParam, sum_param<T>);
  set(Loop::kCountGrad, count_grad<T>);
  set(Loop::kSumRuleGrad, sum_rule_grad<T>);
  set(Loop::kSumUpdate, sum_update<T>);
  set(Loop::kCountAgreeing, count_agreeing<T>);
  set(Loop::kSumRow, sum_row<T>);
  set(Loop::kSumRowSquares, sum_row_squares<T>);
  set(Loop::kSumParamRow, sum_param_row<T>);
}

template <class T, class... Rule, class... GradientStage, class... ParamStage, std::size_t... kStates>
constexpr TypedKernels typed(List<Rule...>, List<GradientStage...>, List<ParamStage...>, std::index_sequence<kStates...>) {
  TypedKernels kernels{
      {}, {}, {gradient_stage<GradientStage, T>...}, {param_stage<ParamStage, T>...}, {}, {touch<T, kStates>...}, sweep<T>};
  int rule = 0;
  ((fill_updates<Rule, T>(kernels, rule), fill_directions<Rule, T, NoDecay>(kernels.direction[rule][0]),
    fill_directions<Rule, T, DecoupledDecay>(kernels.direction[rule][1]), ++rule),
   ...);
  fill_loops<T>(kernels.loops);
  return kernels;
}

constexpr auto kStateCounts = std::make_index_sequence<kMaxStates + 1>();
constexpr Kernels kKernels{typed<float>(Rules{}, GradientStages{}, ParamStages{}, kStateCounts),
                           typed<double>(Rules{}, GradientStages{}, ParamStages{}, kStateCounts)};

template <>
const TypedKernels& kernels_of<float>() {
  return kKernels.float32;
}
template <>
const TypedKernels& kernels_of<double>() {
  return kKernels.float64;
}

}  // namespace

#define GRADSTEP_JOIN(a, b) a##b
#define GRADSTEP_ACCESSOR(isa) GRADSTEP_JOIN(kernels_, isa)

const Kernels& GRADSTEP_ACCESSOR(GRADSTEP_ISA)();
const Kernels& GRADSTEP_ACCESSOR(GRADSTEP_ISA)() { return kKernels; }

}  // namespace gradstep::cpu
