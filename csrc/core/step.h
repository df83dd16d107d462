// A step of a list of tensors: what an engine is given, what it found, and what is worked out between its sweeps.
//
//   sums over the gradients -> factors of clipping, whether to skip -> sums over the updates -> trust ratios -> the update
//
// Most steps need no sums and are one sweep. Sweeps before the last read and write nothing, so a step can be left out until
// then.
#pragma once

#include "factors.h"

namespace gradstep {

struct StepOptions {
  double clip_norm = kNoLimit;         // over all tensors
  bool checks = false;                 // leave the step out if a gradient has an element that is not finite
  bool leave_out = false;              // leave it out whatever the gradients are
  bool stats = false;
  bool zero_gradient = false;
  bool zero_skipped = false;           // also where the step is left out
  const double* weights = nullptr;     // of several gradients
  int n_gradients = 1;

  GRADSTEP_HD bool clips() const { return clip_norm != kNoLimit; }
};

// The sums that a step needs of its tensors' gradients.
struct Needs {
  bool norms = false;   // of some of them
  bool all = false;     // of all
  bool counts = false;  // with the statistics

  // The norm of a gradient says whether it is finite, but for squares that are not, and elements that a stage hides.
  void add(const StepOptions& options, const Settings& settings, Format compute) {
    all = options.clips() || options.checks || options.stats;
    norms = norms || options.clips() || options.checks || settings.wants_gradient_norms();
    counts = counts || options.stats || (options.checks && (compute == Format::kFloat64 || sums_gradient_apart(settings)));
  }
};

// Whether a gradient is finite, as far as its sums tell.
GRADSTEP_HD bool is_finite(const Sums& came, bool counts) {
  if (counts) return came.at[kNans] + came.at[kInfs] == 0;
  return came.at[kGradSquares] - came.at[kGradSquares] == 0;
}

// The squares that clipping goes by.
GRADSTEP_HD double squares_for_clipping(const Settings& settings, const Sums& sums, bool counted) {
  return sums.at[counted && !sums_gradient_apart(settings) ? kCameSquares : kGradSquares];
}

// The factor of a tensor by its own norm.
GRADSTEP_HD double tensor_clip_factor(const Settings& settings, double squares) {
  return settings.clip_norm == kNoLimit ? 1 : clip_factor(settings.clip_norm, square_root(squares));
}

// What LARS and NovoGrad do to the gradient, whose norm is that of what clipping has left. `factors.gradient` is what clipping
// says.
GRADSTEP_HD void adapt(const Settings& settings, double step, const Sums& came, bool counted, double& norm_state,
                       Factors& factors) {
  const double grad_norm = factors.gradient * square_root(squares_for_clipping(settings, came, counted));
  if (settings.adaptation == Adaptation::kLars) {
    const double factor = lars_factor(settings, square_root(came.at[kParamSquares]), grad_norm);
    (settings.decay == Decay::kCoupled ? factors.decayed : factors.gradient) *= factor;
  } else if (settings.adaptation == Adaptation::kNovograd) {
    factors.gradient *= novograd_factor(settings, step, grad_norm, norm_state);
  }
}

GRADSTEP_HD void set_trust(const Settings& settings, const Sums& sums, Factors& factors) {
  const double param = square_root(sums.at[kParamSquares]), update = square_root(sums.at[kUpdateSquares]);
  (settings.cautious ? factors.late_trust : factors.trust) = trust_ratio(settings, param, update);
}

// The statistics of a step that was carried out, from the sums before it, if there were any, and those of the update itself.
GRADSTEP_HD Sums seen_sums(const Settings& settings, const Sums* came, const Sums& sums, double gradient_factor) {
  Sums seen = came ? *came : sums;
  for (const Sum sum : {kParamSquares, kUpdateSquares, kRuleGradSquares}) seen.at[sum] = sums.at[sum];
  if (!changes_gradient(settings)) {
    seen.at[kRuleGradSquares] = gradient_factor * gradient_factor * seen.at[kCameSquares];
  }
  return seen;
}

// What a step saw of one tensor.
struct Seen {
  Sums sums;
  double clip_factor = 1;  // of this tensor's norm and the overall one
};

}  // namespace gradstep
