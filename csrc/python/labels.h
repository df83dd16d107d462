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

struct Labels {
  std::string function;
  Face face;

  // Operand `k` (0 the parameter, 1 the gradient, then the states, then "step") of entry `index`, which the face calls `key`.
  std::string operand(int k, const RuleInfo& rule, std::size_t index, PyObject* key) const {
    const std::string name = k < 2 ? ""
                             : k - 2 < static_cast<int>(rule.states.size())
                                 ? rule.state_names()[static_cast<std::size_t>(k - 2)]
                                 : "step";
    if (face == Face::kArray) return k == 0 ? "param" : k == 1 ? "grad" : name;
    const std::string at =
        "[" + (key && face == Face::kNumpy ? pybind11::repr(key).cast<std::string>() : std::to_string(index)) + "]";
    if (k == 0) return "params" + at;
    if (face == Face::kArrays) return (k == 1 ? "grads" : name) + at;
    if (face == Face::kNumpy) return k == 1 ? "grads" + at : "state" + at + "['" + name + "']";
    return k == 1 ? "params" + at + ".grad" : "state[params" + at + "]['" + name + "']";
  }
};

}  // namespace gradstep::python
