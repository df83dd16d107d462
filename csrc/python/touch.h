// The access pattern of a rule without its math, for benchmarks.
#pragma once

#include <pybind11/pybind11.h>

namespace gradstep::python {

// Reads and writes the arrays as a rule would (`outputs` the parameter and its states, `inputs` its gradient), on the same
// threads and chunks, and leaves them as they are.
void touch(const pybind11::list& outputs, const pybind11::list& inputs);

}  // namespace gradstep::python
