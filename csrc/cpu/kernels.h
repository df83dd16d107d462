// The table of loops that each instruction set's object hands out.
#pragma once

#include "../core/norms.h"
#include "../core/pipeline.h"

namespace gradstep::cpu {

// A run of elements on its way through the pipeline. Pointers lead to the operand itself where it is stored contiguously in the
// compute type, else to a decoded copy. A gradient is never written: a stage that changes it does so in `scratch`.
template <class T>
struct Tile {
  T* param;
  const T* grad;
  T* states[kMaxStates];
  T* extras[kMaxExtras];
  T* scratch;  // for a gradient that changes
  T* update;   // for an update that does not go straight to the parameter
  std::int64_t begin, size;
  std::int64_t ahead;    // how many elements ahead memory is asked for the operands; 0 if they are in the caches
  std::uint32_t copied;  // operands of which this is a copy, a bit each
  T scale, gradient_factor, decayed_factor, cautious_factor, trust_factor,
      late_trust_factor;  // see Factors; `scale` is the settings'
  std::int64_t row;  // elements of a row, as many as stand in the tile; its size where there are no rows
  const RowValues* row_values;  // one a row of the tile
  RowSums* row_sums;
  Sums* sums;  // of this block
};

// One loop over a tile (a `Tile<T>` of the operation's own compute type) with its constants.
using Function = void (*)(const std::byte* constants, void* tile);

// Which operands an update takes as they are stored, in bfloat16: the others are of the compute type, float32.
enum class Brains { kNone, kAll, kParamAndGrad, kStates, kGrad, kGradAndStates, kBrains };

// The loops of one compute type.
struct TypedKernels {
  // Straight to the parameter: gradient factors, coupled decay, rule, decoupled decay, subtraction. Those of float64 are for
  // Brains::kNone alone.
  Function update[static_cast<int>(Brains::kBrains)][Rules::size][kDecays][2 /* first step */];
  // To the tile's update: the rule, decoupled decay if it is to be there, trust factor.
  Function direction[Rules::size][2 /* decay */][2 /* dry: leaves the states as they are */][2 /* first step */];
  Function gradient_stages[GradientStages::size];
  Function param_stages[ParamStages::size];
  Function loops[static_cast<int>(Loop::kLoops)];
  Function touch[kMaxStates + 1];  // by the number of states
  // Carries elements [begin, end) of a sweep through a pipeline. `prefetch`: the operands are too large for the caches.
  void (*sweep)(const Work& work, std::int64_t begin, std::int64_t end, bool prefetch);

  GRADSTEP_HD Function find(const Operation& operation, Brains brains) const {
    const int decay = static_cast<int>(operation.decay);
    switch (operation.loop) {
      case Loop::kUpdate:
        return update[static_cast<int>(brains)][operation.index][decay][operation.first];
      case Loop::kDirection:
        return direction[operation.index][operation.decay == Decay::kDecoupled][operation.dry][operation.first];
      case Loop::kGradientStage:
        return gradient_stages[operation.index];
      case Loop::kParamStage:
        return param_stages[operation.index];
      case Loop::kTouch:
        return touch[operation.index];
      default:
        return loops[static_cast<int>(operation.loop)];
    }
  }
};

struct Kernels {
  TypedKernels float32, float64;

  const TypedKernels& of(Format compute) const { return compute == Format::kFloat32 ? float32 : float64; }
};

}  // namespace gradstep::cpu
