// The numbers of a stage that every element of a tensor, or of a row, shares: in double, from settings and sums. Each formula
// of docs/stages.md that is not one of an element stands here.
#pragma once

#include "norms.h"
#include "power.h"
#include "settings.h"

namespace gradstep {

GRADSTEP_HD double larger(double a, double b) { return a < b ? b : a; }
GRADSTEP_HD double smaller(double a, double b) { return b < a ? b : a; }

// ---- of a tensor ----------------------------------------------------------------------------------------------------------

// As torch's clip_grad_norm_: NaN for a NaN norm.
GRADSTEP_HD double clip_factor(double limit, double norm) {
  const double factor = limit / (norm + 1e-6);
  return factor > 1 ? 1 : factor;
}

// LARS: the length that the gradient, with its coupled decay, is to have in units of the parameter's.
GRADSTEP_HD double lars_factor(const Settings& settings, double param_norm, double grad_norm) {
  if (param_norm == 0 || grad_norm == 0) return 1;
  const double decay = settings.decay == Decay::kCoupled ? settings.weight_decay : 0;
  return settings.coefficient * param_norm / (grad_norm + decay * param_norm + settings.adaptation_eps);
}

// NovoGrad: the second moment of the gradient's norm moves, and the gradient is divided by its root.
GRADSTEP_HD double novograd_factor(const Settings& settings, double step, double grad_norm, double& moment) {
  const double squared = grad_norm * grad_norm;
  moment = step == 1 ? squared : settings.norm_beta * moment + (1 - settings.norm_beta) * squared;
  return 1 / (square_root(moment) + settings.adaptation_eps);
}

GRADSTEP_HD double cautious_factor(std::int64_t size, double agreeing) {
  const auto all = static_cast<double>(size);
  return all / larger(agreeing, all / 1000);
}

GRADSTEP_HD double trust_ratio(const Settings& settings, double param_norm, double update_norm) {
  if (param_norm == 0 || update_norm == 0) return 1;
  const double ratio = settings.lr() * param_norm / update_norm;
  return ratio < settings.trust_low ? settings.trust_low : ratio > settings.trust_high ? settings.trust_high : ratio;
}

// What decoupled decay multiplies `weight_decay` by.
GRADSTEP_HD double decay_rate(const Settings& settings) { return settings.independent_decay ? 1 : settings.lr(); }

GRADSTEP_HD double noise_sigma(const Settings& settings, double step) {
  return square_root(settings.noise / real_power(1 + step, settings.noise_decay));
}

// The weight of the newest parameter in the n-th average.
GRADSTEP_HD double ema_weight(const Settings& settings, double n) {
  const double d = settings.ema_decay;
  if (settings.ema_correction == EmaCorrection::kBias) return (1 - d) / (1 - power(d, n));
  if (n == 1) return 1;
  return 1 - (settings.ema_correction == EmaCorrection::kWarmup ? smaller(d, (1 + n) / (10 + n)) : d);
}

// Whether a whole number is a multiple of another.
GRADSTEP_HD bool is_multiple(double n, double of) { return floor(n / of) * of == n; }

// Whether a step counts in the equal average, and whether the slow weights move at it.
GRADSTEP_HD bool swa_takes(const Settings& settings, double step) {
  return settings.swa_every > 0 && step > settings.swa_start && is_multiple(step - settings.swa_start, settings.swa_every);
}
GRADSTEP_HD bool lookahead_moves(const Settings& settings, double step) {
  return settings.lookahead_steps > 0 && is_multiple(step, settings.lookahead_steps);
}

// ---- of a row -------------------------------------------------------------------------------------------------------------

// Adaptive gradient clipping, and the mean to be subtracted.
struct GradientRow {
  double agc, eps;  // agc is infinite where there is none

  GRADSTEP_HD RowValues operator()(const RowSums& sums, std::int64_t length, double gradient_factor) const {
    RowValues values;
    if (agc != kNoLimit) {
      const double param = square_root(sums.param_squares), grad = square_root(sums.grad_squares);
      const double limit = agc * (param < eps ? eps : param);
      if (grad > limit) values.factor = limit / larger(grad, 1e-6);
    }
    values.mean = values.factor * gradient_factor * sums.grad / static_cast<double>(length);
    return values;
  }
};

// The proximal map of a penalty on the norm of the row.
struct GroupLasso {
  double threshold;

  GRADSTEP_HD RowValues operator()(const RowSums& sums, std::int64_t, double) const {
    const double norm = square_root(sums.param_squares), left = 1 - threshold / norm;
    return {norm == 0 || left < 0 ? 0 : left, 0};
  }
};

struct MaxNorm {
  double limit;

  GRADSTEP_HD RowValues operator()(const RowSums& sums, std::int64_t, double) const {
    const double norm = square_root(sums.param_squares);
    return {norm > limit ? limit / norm : 1, 0};
  }
};

// The values of a row, by one of the above, whose constants these are.
GRADSTEP_HD RowValues finish_row(RowResult result, const std::byte* constants, const RowSums& sums, std::int64_t length,
                                 double gradient_factor) {
  const auto by = [&]<class Row>() { return (*reinterpret_cast<const Row*>(constants))(sums, length, gradient_factor); };
  switch (result) {
    case RowResult::kGradient:
      return by.template operator()<GradientRow>();
    case RowResult::kGroupLasso:
      return by.template operator()<GroupLasso>();
    default:
      return by.template operator()<MaxNorm>();
  }
}

}  // namespace gradstep
