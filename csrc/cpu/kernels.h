// The table of loops that each instruction set's object hands out.
#pragma once

#include "../core/stages.h"
#include "../core/sweep.h"
#include "../registry.h"

namespace gradstep::cpu {

// The loops of one compute type.
struct TypedKernels {
  Operation update[Rules::size][kDecays][2 /* first step */];
  Operation stages[GradientStages::size];
  Operation touch[kMaxStates + 1];  // by the number of states
  // Carries elements [begin, end) of a sweep through a pipeline. `prefetch`: the operands are too large for the caches.
  void (*sweep)(const Sweep& sweep, const Pipeline& pipeline, std::int64_t begin, std::int64_t end, bool prefetch);
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
