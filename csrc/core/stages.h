// Stages: what happens to a gradient before the rule, to the rule's update before it meets the parameter, and to the parameter
// after that. A stage knows no rule and a rule no stage. Each is one small loop over a tile that lives in the L1 cache, so
// rules and stages add up and never multiply; a stage that is off is not called. The whole order is in docs/stages.md.
#pragma once

#include "math.h"
#include "rule.h"

namespace gradstep {

// ---- of the gradient ------------------------------------------------------------------------------------------------------

//   g <- 0 where g is not finite
struct ZeroNonfinite {
  static constexpr const char* name = "zero_nonfinite";
  static constexpr std::array<Field, 0> fields{};

  template <class T>
  struct Op {
    GRADSTEP_HD explicit Op(const ZeroNonfinite&) {}
    GRADSTEP_HD T operator()(T g) const { return g - g == T(0) ? g : T(0); }
  };
};

//   g <- min(max(g, -clip_value), clip_value)
struct ClipValue {
  double clip_value;
  static constexpr const char* name = "clip_value";
  static constexpr std::array<Field, 1> fields{{{"clip_value", Range::kNonNegative}}};

  template <class T>
  struct Op {
    T limit;
    GRADSTEP_HD explicit Op(const ClipValue& stage) : limit(T(stage.clip_value)) {}
    GRADSTEP_HD T operator()(T g) const { return clamp(g, -limit, limit); }
  };
};

using GradientStages = List<ZeroNonfinite, ClipValue>;

//   g <- factor (scale g)                    grad_scale, and what follows from norms
template <class T>
GRADSTEP_HD T scaled_gradient(T g, T scale, T factor) {
  return factor * (scale * g);
}

// ---- decay ----------------------------------------------------------------------------------------------------------------

// Decays stand next to the rule: the coupled one right before it, the decoupled one right after. So they need no loop of their
// own where nothing else comes between; each is a variant of the rule's.
enum class Decay { kNone, kCoupled, kDecoupled };
inline constexpr int kDecays = 3;

//   g <- factor (g + weight_decay p)         the gradient of an L2 penalty: torch's `weight_decay` of SGD, Adam, ...
//
// The factor is 1 but for LARS, which scales gradient and decay together.
struct CoupledDecay {
  double weight_decay;
  static constexpr const char* name = "coupled_decay";
  static constexpr std::array<Field, 1> fields{{{"weight_decay", Range::kNonNegative}}};

  template <class T>
  struct Op {
    T weight_decay;
    GRADSTEP_HD Op(const CoupledDecay& stage, double) : weight_decay(T(stage.weight_decay)) {}
    GRADSTEP_HD T gradient(T g, T p, T factor) const { return factor * (g + weight_decay * p); }
    GRADSTEP_HD T total(T update, T) const { return update; }
  };
};

//   p <- p - (lr weight_decay p + update)    AdamW's and Lion's decay
//
// The decay joins the update before it meets p, so p is rounded once a step: over 2,000 float32 steps that leaves 25 to 48
// times less error than (1 - lr weight_decay) p - update.
struct DecoupledDecay {
  double weight_decay;
  static constexpr const char* name = "decoupled_decay";
  static constexpr std::array<Field, 1> fields{{{"weight_decay", Range::kNonNegative}}};

  template <class T>
  struct Op {
    T decay;
    GRADSTEP_HD Op(const DecoupledDecay& stage, double lr) : decay(T(lr * stage.weight_decay)) {}
    GRADSTEP_HD T gradient(T g, T, T) const { return g; }
    GRADSTEP_HD T total(T update, T p) const { return decay * p + update; }
  };
};

// No decay. Not a decay by 0: 0 times infinity would be NaN.
struct NoDecay {
  double unused;

  template <class T>
  struct Op {
    GRADSTEP_HD Op(const NoDecay&, double) {}
    GRADSTEP_HD T gradient(T g, T, T) const { return g; }
    GRADSTEP_HD T total(T update, T) const { return update; }
  };
};

// In the order of `Decay`.
using Decays = List<NoDecay, CoupledDecay, DecoupledDecay>;

// ---- of the update --------------------------------------------------------------------------------------------------------

// Whether an element of the update goes along the gradient.
template <class T>
GRADSTEP_HD bool agree(T update, T g) {
  return ((update > T(0)) & (g > T(0))) | ((update < T(0)) & (g < T(0)));
}

//   u <- factor u where it goes along the gradient, else 0
template <class T>
GRADSTEP_HD T cautious_update(T update, T g, T factor) {
  const T kept = factor * update;
  return agree(update, g) ? kept : T(0);
}

// ---- of the parameter -----------------------------------------------------------------------------------------------------

//   p <- sign(p) max(|p| - lr l1, 0) / (1 + lr l2)
//
// the proximal map of lr (l1 |p| + l2/2 p^2).
struct ElasticNet {
  double l1, l2;
  static constexpr const char* name = "elastic_net";
  static constexpr std::array<Field, 2> fields{{{"l1", Range::kNonNegative}, {"l2", Range::kNonNegative}}};

  template <class T>
  struct Op {
    T threshold, shrink;
    GRADSTEP_HD Op(const ElasticNet& stage, double lr) : threshold(T(lr * stage.l1)), shrink(T(1 / (1 + lr * stage.l2))) {}
    GRADSTEP_HD T operator()(T p) const { return sign(p) * maximum(magnitude(p) - threshold, T(0)) * shrink; }
  };
};

//   p <- min(max(p, low), high)              infinite where there is no limit
struct Bounds {
  double low, high;
  static constexpr const char* name = "bounds";
  static constexpr std::array<Field, 2> fields{{{"bounds[0]", Range::kNumber}, {"bounds[1]", Range::kNumber}}};

  template <class T>
  struct Op {
    T low, high;
    GRADSTEP_HD Op(const Bounds& stage, double) : low(T(stage.low)), high(T(stage.high)) {}
    GRADSTEP_HD T operator()(T p) const { return clamp(p, low, high); }
  };
};

using ParamStages = List<ElasticNet, Bounds>;

//   a <- a + weight (p - a)                  averages, slow weights
template <class T>
GRADSTEP_HD T averaged(T average, T p, T weight) {
  return average + weight * (p - average);
}

}  // namespace gradstep
