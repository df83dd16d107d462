// Names of operands for messages: "grads[3]", "state['w']['exp_avg']", "params[3].grad".
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "entry.h"
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
enum Beside { kStepCount = kMaxViews, kEmaCount, kSwaCount, kNormState, kFurtherGradients };

// Names of extras in a parameter's states.
inline constexpr const char* kExtraNames[kMaxExtras] = {"ema", "swa", "slow"};

// And of what a parameter has no room for.
inline const char* rest_name(Precision precision) {
  return precision == Precision::kKahan ? "compensation" : precision == Precision::kMaster ? "master" : "remainder";
}

struct Labels {
  std::string function;
  Face face;
  bool several_gradients;

  // Operand `k` (as `roles` counts; from kFurtherGradients on the further gradients; else a number beside) of entry `index`,
  // which the face calls `key`.
  std::string operand(int k, const RuleInfo& rule, const Roles& roles, std::size_t index, PyObject* key) const {
    const bool gradient = k == 1 || k >= kFurtherGradients;
    const std::string name = state(k, rule, roles);
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
  static std::string state(int k, const RuleInfo& rule, const Roles& roles) {
    switch (k) {
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
    const auto name = [](PyObject* text) { return pybind11::cast<std::string>(pybind11::handle(text)); };
    const auto n = static_cast<int>(rule.states.size());
    if (k < 2 || k > kMaxViews) return "";
    if (k < 2 + n) return name(rule.states[static_cast<std::size_t>(k - 2)]);
    for (int extra = 0, left = k - 2 - n; extra < kMaxExtras; ++extra) {
      if (roles.extras >> extra & 1 && left-- == 0) return kExtraNames[extra];
    }
    if (roles.has_rest() && k == roles.rest()) return rest_name(roles.precision);
    for (int at = 0; at < n; ++at) {
      if (roles.is_codes(2 + at) && roles.scale_of(at) == k) return name(rule.scales[static_cast<std::size_t>(at)]);
    }
    return "";
  }
};

}  // namespace gradstep::python
