// Stochastic gradient descent, with and without momentum (Sutskever et al. 2013, as torch.optim.SGD defines it).
#pragma once

#include "../core/rule.h"

namespace gradstep {

//   p <- p - lr g
struct Sgd {
  double lr;
  static constexpr const char* name = "sgd";
  static constexpr std::array<Field, 1> fields{{{"lr", Range::kNonNegative}}};
  static constexpr std::array<State, 0> states{};

  template <class T>
  struct Update {
    T lr;
    GRADSTEP_HD Update(const Sgd& rule, double) : lr(T(rule.lr)) {}
    GRADSTEP_HD T operator()(T, T g) const { return lr * g; }
  };
};

//   b <- g                                   at step 1: not dampened
//   b <- momentum b + (1 - dampening) g      later
//   p <- p - lr b                            or, with Nesterov, p - lr (g + momentum b)
template <bool kNesterov>
struct SgdMomentum {
  double lr, momentum, dampening;
  static constexpr const char* name = kNesterov ? "sgd_nesterov" : "sgd_momentum";
  static constexpr std::array<Field, 3> fields{
      {{"lr", Range::kNonNegative}, {"momentum", Range::kNonNegative}, {"dampening", Range::kFinite}}};
  static constexpr std::array<State, 1> states{State{"momentum_buffer"}};

  template <class T>
  struct Update {
    T lr, momentum, rest;
    GRADSTEP_HD Update(const SgdMomentum& rule, double)
        : lr(T(rule.lr)), momentum(T(rule.momentum)), rest(T(1 - rule.dampening)) {}
    GRADSTEP_HD T direction(T g, T b) const {
      if constexpr (kNesterov) return lr * (g + momentum * b);
      return lr * b;
    }
    GRADSTEP_HD T operator()(T, T g, T& b) const {
      b = momentum * b + rest * g;
      return direction(g, b);
    }
  };

  template <class T>
  struct First : Update<T> {
    GRADSTEP_HD explicit First(const Update<T>& update) : Update<T>(update) {}
    GRADSTEP_HD T operator()(T, T g, T& b) const {
      b = g;
      return this->direction(g, b);
    }
  };
};

}  // namespace gradstep
