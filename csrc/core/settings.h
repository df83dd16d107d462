// The settings of a step, as numbers: a rule's and those of the stages around it.
#pragma once

#include <cmath>
#include <limits>

#include "stages.h"
#include "sweep.h"

namespace gradstep {

inline constexpr double kNoLimit = std::numeric_limits<double>::infinity();

// How the average of a parameter weighs the newest: see docs/stages.md.
enum class EmaCorrection { kNone, kBias, kWarmup };

// What a per-tensor norm does to the gradient, beside clipping.
enum class Adaptation { kNone, kLars, kNovograd };

inline constexpr int kMaxFields = 6, kMaxStageFields = 2;

// Stages of one list, with their values in the order of their fields.
template <class List>
struct Chosen {
  struct Stage {
    int stage;  // index in the list
    double values[kMaxStageFields];
  };
  Stage stages[List::size];
  int size = 0;

  GRADSTEP_HD bool empty() const { return size == 0; }
  GRADSTEP_HD const Stage* begin() const { return stages; }
  GRADSTEP_HD const Stage* end() const { return stages + size; }
};

// A rule with its settings and the stages around it, as numbers: the same for every tensor of a group. Plain data, which goes
// to a GPU as it stands.
struct Settings {
  int rule = 0;                 // index in the registry
  double values[kMaxFields] = {};  // in the order of the rule's fields; the first is lr

  double scale = 1;                                          // grad_scale, negative to maximize
  Chosen<GradientStages> gradient_stages;                    // in order
  double agc = kNoLimit, agc_eps = 0;
  double clip_norm = kNoLimit;                               // of each tensor
  bool centralize = false;
  double noise = 0, noise_decay = 0;                         // its variance at step t is noise / (1 + t)^noise_decay
  double seed = 0;                                           // of all that is drawn at random
  Adaptation adaptation = Adaptation::kNone;
  double coefficient = 0, adaptation_eps = 0, norm_beta = 0; // LARS: trust coefficient, eps; NovoGrad: beta2, eps
  Decay decay = Decay::kNone;
  double weight_decay = 0;
  bool independent_decay = false;                            // decoupled, and not times lr
  bool cautious = false;
  bool trust_ratio = false;
  double trust_low = 0, trust_high = kNoLimit;
  bool decay_in_ratio = true;  // the update that the ratio looks at and scales has the decay in it
  Chosen<ParamStages> param_stages;                          // in order
  double group_lasso = 0, max_norm = kNoLimit;
  double lookahead_steps = 0, lookahead_alpha = 0;
  Precision precision = Precision::kNearest;                 // of parameters of 16 bits
  bool states_by_chance = false;
  double ema_decay = -1;                                     // negative: no average
  EmaCorrection ema_correction = EmaCorrection::kNone;
  double swa_start = 0, swa_every = 0;                       // every 0: no average

  GRADSTEP_HD double lr() const { return values[0]; }
  GRADSTEP_HD bool has(Extra extra) const {
    return extra == kEma ? ema_decay >= 0 : extra == kSwa ? swa_every > 0 : lookahead_steps > 0;
  }
  // Whether a stage asks for the rows of a tensor of at least two dimensions; adaptive clipping asks for those of any.
  GRADSTEP_HD bool wants_rows() const { return centralize || group_lasso > 0 || max_norm != kNoLimit; }
  // Whether a stage goes by the number of the step.
  GRADSTEP_HD bool wants_step() const { return has(kSlow) || has(kSwa) || adaptation == Adaptation::kNovograd || draws(); }
  // Whether anything is drawn at random: then elements are counted in the order of C, and parameters by their position.
  GRADSTEP_HD bool draws() const { return noise > 0 || precision == Precision::kStochastic || states_by_chance; }
  GRADSTEP_HD std::uint32_t extras() const {
    std::uint32_t bits = 0;
    for (int extra = 0; extra < kMaxExtras; ++extra)
      bits |= static_cast<std::uint32_t>(has(static_cast<Extra>(extra))) << extra;
    return bits;
  }
  GRADSTEP_HD bool wants_gradient_norms() const { return clip_norm != kNoLimit || adaptation != Adaptation::kNone; }
};

// Whether the norm that clipping goes by is another than that of the gradient as it came.
GRADSTEP_HD bool sums_gradient_apart(const Settings& settings) {
  return !settings.gradient_stages.empty() || settings.agc != kNoLimit;
}

// Whether anything but factors stands between the gradient as it came and the rule.
GRADSTEP_HD bool changes_gradient(const Settings& settings) {
  return sums_gradient_apart(settings) || settings.centralize || settings.noise > 0;
}

// What differs from one tensor's step to the next within a group.
struct Moment {
  double step = 2;                  // the number of this step, from 1
  bool first = false;               // the states hold nothing yet
  bool has_rows = false;            // the tensor has two dimensions at least
  double ema_count = 1, swa_count = 1;  // averages, with the one of this step
  std::int64_t position = 0;        // of the parameter in its optimizer

  bool operator==(const Moment&) const = default;
};

}  // namespace gradstep
