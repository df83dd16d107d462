#include "touch.h"

#include <string>
#include <vector>

#include "../cpu/pipeline.h"
#include "../cpu/run.h"
#include "entry.h"
#include "gil.h"

namespace gradstep::python {
namespace py = pybind11;

void touch(const py::list& outputs, const py::list& inputs) {
  const auto n = static_cast<int>(outputs.size()) + 1;
  if (outputs.empty() || n > kMaxOperands || inputs.size() != 1)
    throw py::value_error("touch: takes up to 5 outputs and 1 input");
  PyObject* objects[kMaxOperands] = {outputs[0].ptr(), inputs[0].ptr()};
  for (int k = 2; k < n; ++k) objects[k] = outputs[static_cast<std::size_t>(k - 1)].ptr();
  Holds holds;
  Entry entry;
  try {
    std::vector<View> views(static_cast<std::size_t>(n));
    for (int k = 0; k < n; ++k) read(objects[k], views[static_cast<std::size_t>(k)], holds);
    entry.update(views.data(), n, objects);
  } catch (Problem& problem) {
    py::set_error(problem.type, ("touch: an array " + problem.text).c_str());
    throw py::error_already_set();
  } catch (OperandProblem& problem) {
    py::set_error(problem.problem.type, ("touch: an array " + problem.problem.text).c_str());
    throw py::error_already_set();
  }
  Pipeline pipeline;
  cpu::make_touch_pipeline(n - 2, entry.sweep().compute, pipeline);
  const std::vector<Work> works{{&entry.sweep(), &pipeline}};
  without_gil([&] { cpu::run(works); });
}

}  // namespace gradstep::python
