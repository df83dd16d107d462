// The element loop of LAMB (arXiv:1904.00962, Algorithm 2): Adam's, with its corrections optional. The trust ratio is a stage.
#pragma once

#include <limits>

#include "adam.h"

namespace gradstep {

//   m <- beta1 m + (1 - beta1) g             without grad_averaging: beta1 m + g
//   v <- beta2 v + (1 - beta2) g^2
//   p <- p - lr (m / c1) / (sqrt(v / c2) + eps)          without bias_correction: c1 = c2 = 1
struct Lamb {
  double lr, beta1, beta2, eps, bias_correction, grad_averaging;
  static constexpr const char* name = "lamb";
  static constexpr std::array<Field, 6> fields{{{"lr", Range::kNonNegative},
                                                {"betas[0]", Range::kBelowOne},
                                                {"betas[1]", Range::kBelowOne},
                                                {"eps", Range::kNonNegative},
                                                {"bias_correction", Range::kFinite},
                                                {"grad_averaging", Range::kFinite}}};
  static constexpr std::array<State, 2> states{State{"exp_avg"}, State{"exp_avg_sq", kUnsigned}};

  template <class T>
  struct Update : Adam<false>::Update<T> {
    GRADSTEP_HD Update(const Lamb& rule, double step)
        : Adam<false>::Update<T>({rule.lr, rule.beta1, rule.beta2, rule.eps},
                                 rule.bias_correction != 0 ? step : std::numeric_limits<double>::infinity()) {
      if (rule.grad_averaging == 0) this->rest1 = T(1);
    }
  };
};

}  // namespace gradstep
