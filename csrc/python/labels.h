// Names of operands for messages: "grads[3]", "state['w']['exp_avg']", "params[3].grad".
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "settings.h"

namespace gradstep::python {

// Through which face the operands came: that decides what they are called.
enum class Face {
  kArray,     // a function, one array an operand
  kArrays,    // a function, a sequence of arrays an operand
  kNumpy,     // a NumPy optimizer: parameters and gradients by key, states in `state`
  kTorch,     // a torch optimizer: gradients are attributes of the parameters
};

// The numbers of what is no array of the sweep's own.
enum Beside { kStepCount = kMaxOperands, kEmaCount, kSwaCount, kNormState, kFurtherGradients };

// Names of extras in a parameter's states.
inline constexpr const char* kExtraNames[kMaxExtras] = {"ema", "swa", "slow"};

struct Labels {
  std::string function;
  Face face;
  bool several_gradients;

  // Operand `k` (0 the parameter, 1 the gradient, then the states and those extras that there are; from kFurtherGradients on
  // the further gradients; else a number beside) of entry `index`, which the face calls `key`.
  std::string operand(int k, const RuleInfo& rule, std::uint32_t extras, std::size_t index, PyObject* key) const {
    const bool gradient = k == 1 || k >= kFurtherGradients;
    const std::string name = state(k - 2, rule, extras, k);
    const std::string source = several_gradients ? "[" + std::to_string(k == 1 ? 0 : k - kFurtherGradients + 1) + "]" : "";
    if (face == Face::kArray) return k == 0 ? "param" : gradient ? "grad" : name;
    const std::string at =
        "[" + (key && face == Face::kNumpy ? pybind11::repr(key).cast<std::string>() : std::to_string(index)) + "]";
    if (k == 0) return "params" + at;
    if (gradient) return face == Face::kTorch && !several_gradients ? "params" + at + ".grad" : "grads" + source + at;
    if (face == Face::kArrays) return name + at;
    return face == Face::kNumpy ? "state" + at + "['" + name + "']" : "state[params" + at + "]['" + name + "']";
  }

 private:
  static std::string state(int k, const RuleInfo& rule, std::uint32_t extras, int operand) {
    switch (operand) {
      case kStepCount:
        return "step";
      case kEmaCount:
        return "ema_count";
      case kSwaCount:
        return "swa_count";
      case kNormState:
        return "grad_norm_sq";
      default:
        break;
    }
    const auto n = static_cast<int>(rule.states.size());
    if (k < 0 || operand > kMaxOperands) return "";
    if (k < n) return rule.state_names()[static_cast<std::size_t>(k)];
    for (int extra = 0, left = k - n; extra < kMaxExtras; ++extra) {
      if (extras >> extra & 1 && left-- == 0) return kExtraNames[extra];
    }
    return "";
  }
};

}  // namespace gradstep::python
