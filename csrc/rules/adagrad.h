// Adagrad (Duchi et al. 2011, JMLR 12), as torch.optim.Adagrad defines it.
#pragma once

#include "../core/math.h"
#include "../core/rule.h"

namespace gradstep {

//   s <- s + g^2
//   p <- p - lr_t g / (sqrt(s) + eps)        lr_t = lr / (1 + (t - 1) lr_decay)
struct Adagrad {
  double lr, lr_decay, eps;
  static constexpr const char* name = "adagrad";
  static constexpr std::array<Field, 3> fields{
      {{"lr", Range::kNonNegative}, {"lr_decay", Range::kNonNegative}, {"eps", Range::kNonNegative}}};
  static constexpr std::array<State, 1> states{State{"sum", kUnsigned}};

  template <class T>
  struct Update {
    T lr, eps;
    GRADSTEP_HD Update(const Adagrad& rule, double step)
        : lr(T(rule.lr / (1 + (step - 1) * rule.lr_decay))), eps(T(rule.eps)) {}
    GRADSTEP_HD T operator()(T, T g, T& s) const {
      s = s + g * g;
      return lr * g / (square_root(s) + eps);
    }
  };
};

}  // namespace gradstep
