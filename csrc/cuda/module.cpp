// The extension module `gradstep._cuda`: the driver of GPUs. Importing it asks nothing of CUDA.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "runtime.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "Optimizer steps on NVIDIA GPUs.";
  m.attr("driver") = py::capsule(static_cast<const void*>(&gradstep::cuda::driver()), "gradstep.device_driver");
  m.attr("build") =
      py::dict(py::arg("cuda") = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10),
               py::arg("architectures") = GRADSTEP_CUDA_ARCHITECTURES, py::arg("flags") = GRADSTEP_CUDA_FLAGS);
}
