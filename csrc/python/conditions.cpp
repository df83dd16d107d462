#include "conditions.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>

namespace gradstep::python {
namespace py = pybind11;

Conditions parse_conditions(const py::object& given) {
  Conditions conditions;
  if (given.is_none()) return conditions;
  const auto [clip_norm, nonfinite, stats, zero_grad, weights] =
      given.cast<std::tuple<std::optional<double>, std::string, bool, bool, std::optional<std::vector<double>>>>();
  conditions.options.clip_norm = clip_norm.value_or(kNoLimit);
  conditions.raises = nonfinite == "raise";
  conditions.options.checks = nonfinite != "propagate";
  conditions.options.leave_out = nonfinite == "leave out";
  conditions.options.stats = stats;
  conditions.options.zero_gradient = zero_grad;
  conditions.options.zero_skipped = zero_grad && !conditions.raises;
  if (weights) {
    conditions.weights = *weights;
    conditions.options.n_gradients = static_cast<int>(weights->size());
  }
  return conditions;
}

}  // namespace gradstep::python
