// What holds for a whole step, whatever its groups.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "../cpu/step.h"

namespace gradstep::python {

struct Conditions {
  StepOptions options;
  bool raises = false;          // an error, where the step is left out
  std::vector<double> weights;  // of several gradients
};

// Reads them as Python gives them: None, or a tuple (clip_norm or None, what to do with a gradient that is not finite, stats,
// zero_grad, weights). The second is "propagate", "skip", "raise", or "leave out": skip, whatever the gradients are. `weights`,
// if not None, is a tuple: the gradients are as many lists.
Conditions parse_conditions(const pybind11::object& given);

}  // namespace gradstep::python
