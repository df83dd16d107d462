// The element loop of NovoGrad (arXiv:1905.11286, Algorithm 1). That the gradient comes divided by the root of an average of
// its squared norms, tensor by tensor, is a stage.
#pragma once

#include "../core/rule.h"

namespace gradstep {

//   m <- beta1 m + g                         with grad_averaging: beta1 m + (1 - beta1) g
//   p <- p - lr m
struct Novograd {
  double lr, beta1, grad_averaging;
  static constexpr const char* name = "novograd";
  static constexpr std::array<Field, 3> fields{
      {{"lr", Range::kNonNegative}, {"betas[0]", Range::kBelowOne}, {"grad_averaging", Range::kFinite}}};
  static constexpr std::array<State, 1> states{State{"exp_avg"}};

  template <class T>
  struct Update {
    T lr, beta1, rest1;
    GRADSTEP_HD Update(const Novograd& rule, double)
        : lr(T(rule.lr)), beta1(T(rule.beta1)), rest1(T(rule.grad_averaging != 0 ? 1 - rule.beta1 : 1)) {}
    GRADSTEP_HD T operator()(T, T g, T& m) const {
      m = beta1 * m + rest1 * g;
      return lr * m;
    }
  };
};

}  // namespace gradstep
