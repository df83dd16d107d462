// Adam (arXiv:1412.6980, Algorithm 1) and its AMSGrad form (arXiv:1904.09237, Algorithm 2). With decoupled decay it is AdamW
// (arXiv:1711.05101, Algorithm 2), with coupled decay torch's Adam with weight_decay; both decays are stages.
#pragma once

#include "../core/math.h"
#include "../core/power.h"
#include "../core/rule.h"

namespace gradstep {

//   m <- beta1 m + (1 - beta1) g
//   v <- beta2 v + (1 - beta2) g^2
//   w <- max(w, v)                           AMSGrad; otherwise w is v
//   p <- p - step_size m / (sqrt(w) + eps')
//
// which is torch's (lr / c1) m / (sqrt(w) / sqrt(c2) + eps), c1 = 1 - beta1^t, c2 = 1 - beta2^t, with both corrections folded
// into step_size = lr sqrt(c2) / c1 and eps' = eps sqrt(c2): one division and one square root an element.
template <bool kAmsgrad>
struct Adam {
  double lr, beta1, beta2, eps;
  static constexpr const char* name = kAmsgrad ? "adam_amsgrad" : "adam";
  static constexpr std::array<Field, 4> fields{{{"lr", Range::kNonNegative},
                                                {"betas[0]", Range::kBelowOne},
                                                {"betas[1]", Range::kBelowOne},
                                                {"eps", Range::kNonNegative}}};
  static constexpr auto states = [] {
    if constexpr (kAmsgrad)
      return std::array{State{"exp_avg"}, State{"exp_avg_sq", kUnsigned}, State{"max_exp_avg_sq", kUnsigned}};
    else return std::array{State{"exp_avg"}, State{"exp_avg_sq", kUnsigned}};
  }();

  template <class T>
  struct Update {
    T beta1, rest1, beta2, rest2, step_size, eps;
    GRADSTEP_HD Update(const Adam& rule, double step)
        : beta1(T(rule.beta1)), rest1(T(1 - rule.beta1)), beta2(T(rule.beta2)), rest2(T(1 - rule.beta2)) {
      const double root2 = square_root(1 - power(rule.beta2, step));
      step_size = T(rule.lr * root2 / (1 - power(rule.beta1, step)));
      eps = T(rule.eps * root2);
    }
    GRADSTEP_HD void average(T g, T& m, T& v) const {
      m = beta1 * m + rest1 * g;
      v = beta2 * v + rest2 * (g * g);
    }
    GRADSTEP_HD T direction(T m, T w) const { return step_size * m / (square_root(w) + eps); }

    GRADSTEP_HD T operator()(T, T g, T& m, T& v) const {
      average(g, m, v);
      return direction(m, v);
    }
    GRADSTEP_HD T operator()(T, T g, T& m, T& v, T& w) const {
      average(g, m, v);
      w = maximum(v, w);
      return direction(m, w);
    }
  };
};

}  // namespace gradstep
