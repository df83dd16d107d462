// RMSprop (Hinton's lecture 6.5; centered: arXiv:1308.0850, section 4.2), as torch.optim.RMSprop defines it.
#pragma once

#include "../core/math.h"
#include "../core/rule.h"

namespace gradstep {

//   v <- alpha v + (1 - alpha) g^2
//   a <- alpha a + (1 - alpha) g             centered
//   d  = g / (sqrt(v) + eps)                 centered: sqrt(v - a^2)
//   b <- momentum b + d                      with momentum; otherwise b is d
//   p <- p - lr b
template <bool kMomentum, bool kCentered>
struct Rmsprop {
  double lr, alpha, eps, momentum;
  static constexpr const char* name =
      kMomentum ? (kCentered ? "rmsprop_momentum_centered" : "rmsprop_momentum") : (kCentered ? "rmsprop_centered" : "rmsprop");
  static constexpr std::array<Field, 4> fields{{{"lr", Range::kNonNegative},
                                                {"alpha", Range::kNonNegative},
                                                {"eps", Range::kNonNegative},
                                                {"momentum", Range::kNonNegative}}};
  static constexpr auto states = [] {
    if constexpr (kMomentum && kCentered)
      return std::array{State{"square_avg", kUnsigned}, State{"momentum_buffer"}, State{"grad_avg"}};
    else if constexpr (kMomentum) return std::array{State{"square_avg", kUnsigned}, State{"momentum_buffer"}};
    else if constexpr (kCentered) return std::array{State{"square_avg", kUnsigned}, State{"grad_avg"}};
    else return std::array{State{"square_avg", kUnsigned}};
  }();

  template <class T>
  struct Update {
    T lr, alpha, rest, eps, momentum;
    GRADSTEP_HD Update(const Rmsprop& rule, double)
        : lr(T(rule.lr)), alpha(T(rule.alpha)), rest(T(1 - rule.alpha)), eps(T(rule.eps)), momentum(T(rule.momentum)) {}
    GRADSTEP_HD T average(T g, T& v) const { return v = alpha * v + rest * (g * g); }
    GRADSTEP_HD T variance(T g, T& v, T& a) const {
      a = alpha * a + rest * g;
      return average(g, v) - a * a;
    }
    GRADSTEP_HD T scaled(T g, T variance) const { return g / (square_root(variance) + eps); }
    GRADSTEP_HD T accumulated(T d, T& b) const { return b = momentum * b + d; }

    GRADSTEP_HD T operator()(T, T g, T& v) const { return lr * scaled(g, average(g, v)); }
    GRADSTEP_HD T operator()(T, T g, T& v, T& b_or_a) const {
      if constexpr (kCentered) return lr * scaled(g, variance(g, v, b_or_a));
      return lr * accumulated(scaled(g, average(g, v)), b_or_a);
    }
    GRADSTEP_HD T operator()(T, T g, T& v, T& b, T& a) const { return lr * accumulated(scaled(g, variance(g, v, a)), b); }
  };
};

}  // namespace gradstep
