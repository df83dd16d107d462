// The table of loops that each instruction set's object hands out.
#pragma once

#include "../core/norms.h"
#include "../core/stages.h"
#include "../core/sweep.h"
#include "../registry.h"

namespace gradstep::cpu {

// Loops that belong to no rule and need no constants but the tile's own factors, or those noted.
enum class Loop {
  // gradient
  kFactors,           // scratch <- gradient_factor (scale g), both taken off the tile then
  kScaleRow,        // g <- the row's factor g
  kCentralize,      // g <- g - the row's mean
  kNoise,           // g <- g + sigma z                     NoiseConstants
  kCouple,          // g <- decayed_factor (g + wd p)       double weight_decay
  // update
  kCautious,
  kDecay,           // u <- decay p + u                     double decay
  kTrust,
  kApply,           // p <- p - u
  // parameter
  kScaleParamRow,   // p <- the row's factor p
  kEma,             // a <- a + w (p - a)                   double weight
  kSwa,
  kLookahead,       // s <- s + w (p - s), p <- s           double weight
  // arrays alone
  kScale,           // p <- gradient_factor p
  kSwap,            // p <-> the first state
  kCopyTo,          // the first state <- p
  kCopyFrom,        // p <- the first state
  // sums
  kSumGrad,         // squares of scale g
  kSumParam,
  kCountGrad,       // squares, NaN, infinite, zero, largest of scale g
  kSumRuleGrad,     // squares of g, as the rule gets it
  kSumUpdate,       // squares of u and p
  kCountAgreeing,
  kSumRow,          // by row: elements of g
  kSumRowSquares,   // squares of g and p
  kSumParamRow,     // squares of p
  kLoops
};

struct NoiseConstants {
  double sigma;
  std::uint64_t seed;
  std::uint32_t stream, step;
};

// Which operands an update takes as they are stored, in bfloat16: the others are of the compute type, float32.
enum class Brains { kNone, kAll, kParamAndGrad, kStates, kGrad, kGradAndStates, kBrains };

// The loops of one compute type.
struct TypedKernels {
  // Straight to the parameter: gradient factors, coupled decay, rule, decoupled decay, subtraction. Those of float64 are for
  // Brains::kNone alone.
  Operation update[static_cast<int>(Brains::kBrains)][Rules::size][kDecays][2 /* first step */];
  // To the tile's update: the rule, decoupled decay if it is to be there, trust factor.
  Operation direction[Rules::size][2 /* decay */][2 /* dry: leaves the states as they are */][2 /* first step */];
  Operation gradient_stages[GradientStages::size];
  Operation param_stages[ParamStages::size];
  Operation loops[static_cast<int>(Loop::kLoops)];
  Operation touch[kMaxStates + 1];  // by the number of states
  // Carries elements [begin, end) of a sweep through a pipeline. `prefetch`: the operands are too large for the caches.
  void (*sweep)(const Work& work, std::int64_t begin, std::int64_t end, bool prefetch);
};

struct Kernels {
  TypedKernels float32, float64;

  const TypedKernels& of(Format compute) const { return compute == Format::kFloat32 ? float32 : float64; }
};

// The constants of an update: the rule's, then the decay's.
template <class Update, class DecayOp>
struct Decayed {
  Update update;
  DecayOp decay;
};

}  // namespace gradstep::cpu
