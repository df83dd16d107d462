// Lion (arXiv:2302.06675, Algorithm 2), without its decay, which is a stage.
#pragma once

#include "../core/math.h"
#include "../core/rule.h"

namespace gradstep {

//   c <- beta1 m + (1 - beta1) g
//   m <- beta2 m + (1 - beta2) g
//   p <- p - lr sign(c)                      sign(0) is 0, sign(NaN) is NaN
struct Lion {
  double lr, beta1, beta2;
  static constexpr const char* name = "lion";
  static constexpr std::array<Field, 3> fields{
      {{"lr", Range::kNonNegative}, {"betas[0]", Range::kBelowOne}, {"betas[1]", Range::kBelowOne}}};
  static constexpr std::array<State, 1> states{State{"exp_avg"}};

  template <class T>
  struct Update {
    T lr, beta1, rest1, beta2, rest2;
    GRADSTEP_HD Update(const Lion& rule, double)
        : lr(T(rule.lr)), beta1(T(rule.beta1)), rest1(T(1 - rule.beta1)), beta2(T(rule.beta2)), rest2(T(1 - rule.beta2)) {}
    GRADSTEP_HD T operator()(T, T g, T& m) const {
      const T c = beta1 * m + rest1 * g;
      m = beta2 * m + rest2 * g;
      return lr * sign(c);
    }
  };
};

}  // namespace gradstep
