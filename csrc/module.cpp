// The extension module `gradstep._core`: rules, plans, configuration.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/factors.h"
#include "cpu/isa.h"
#include "cpu/pool.h"
#include "cpu/run.h"
#include "cuda/emulation.h"
#include "python/alone.h"
#include "python/array.h"
#include "python/device.h"
#include "python/plan.h"
#include "python/settings.h"

namespace py = pybind11;
using namespace gradstep;
using namespace gradstep::python;

namespace {

void register_rules(py::module_& m) {
  py::class_<RuleInfo>(m, "Rule", "A compiled update rule.")
      .def_readonly("name", &RuleInfo::name)
      .def_property_readonly("fields", &RuleInfo::field_names, "Names of its values, in order.")
      .def_property_readonly("states", &RuleInfo::state_names, "Names of its states, in order.")
      .def("__repr__", [](const RuleInfo& rule) { return "<gradstep rule " + rule.name + ">"; });
  py::dict all;
  for (const RuleInfo& rule : rules()) all[py::str(rule.name)] = py::cast(&rule, py::return_value_policy::reference);
  m.attr("rules") = all;
  m.attr("unsigned_states") = py::frozenset(py::cast(unsigned_states()));
  m.attr("stages") = stage_names();
}

void register_plan(py::module_& m) {
  py::enum_<Face>(m, "Face").value("numpy", Face::kNumpy).value("torch", Face::kTorch);
  py::class_<Plan>(m, "Plan", "The checked step of one list of parameters.")
      .def(py::init<std::string, Face, bool>(), py::arg("function"), py::arg("face"), py::arg("counts_steps") = true)
      .def("step", &Plan::step, py::arg("params"), py::arg("grads"), py::arg("keys"), py::arg("state"), py::arg("groups"),
           py::arg("make_state"), py::arg("conditions") = py::none(), py::arg("scaler") = py::none(),
           py::arg("settles") = true);
  m.def(
      "update",
      [](const char* function, const py::tuple& kernel, const py::object& params, const py::object& grads,
         const py::tuple& states, const py::object& step,
         const py::object& conditions) { return Plan::update(function, kernel, params, grads, states, step, conditions); },
      py::arg("function"), py::arg("kernel"), py::arg("params"), py::arg("grads"), py::arg("states"), py::arg("step"),
      py::arg("conditions") = py::none(), "One step of one array, or of sequences of arrays, in place.");
  m.def("touch", &touch, py::arg("outputs"), py::arg("inputs"), "A rule's access to memory without its math. For benchmarks.");
  m.def("sum_of_squares", &sum_of_squares, py::arg("arrays"), py::arg("function"), py::arg("name"),
        "The sum of the squares of all elements. The names are for messages.");
  m.def("scale", &scale, py::arg("arrays"), py::arg("factor"), py::arg("function"), py::arg("name"),
        "Multiply arrays by a number, in place.");
  m.def("clip_factor", &clip_factor, py::arg("limit"), py::arg("norm"),
        "What gradients of this norm are multiplied by: min(limit / (norm + 1e-6), 1).");
  m.def("convert", &convert, py::arg("target"), py::arg("source"), py::arg("is_unsigned"), py::arg("function"),
        "Copy an array into one of another format.");
  m.def("swap", &swap, py::arg("ones"), py::arg("others"), py::arg("function"), "Exchange the elements of arrays, in place.");
}

// For tests: what the emulation of a GPU is to do, and what it was given.
void register_emulation(py::module_& m) {
  m.def(
      "set_emulated_threads",
      [](std::uint32_t n) {
        if (n != 1 && (n == 0 || n % 32 != 0)) throw py::value_error("set_emulated_threads: takes 1 or a multiple of 32");
        cuda::emulation().threads = n;
      },
      py::arg("n"), "Run the blocks of the emulated GPU on so many threads of the host: 1, or a multiple of 32. For tests.");
  m.def(
      "set_emulated_failure", [](bool on) { cuda::emulation().fails = on; }, py::arg("on"),
      "Have the emulated GPU refuse to launch what carries tensors. For tests.");
  m.def(
      "take_emulated",
      [] {
        static constexpr const char* kNames[] = {"prepare", "groups", "settle", "follow", "report", "sums", "update", "tiles"};
        py::list launches;
        for (const cuda::Launch& launch : cuda::emulation().launches) {
          launches.append(py::make_tuple(kNames[static_cast<int>(launch.program)], launch.tasks, launch.shared));
        }
        cuda::emulation().launches.clear();
        return py::make_tuple(launches, std::exchange(cuda::emulation().sent, 0));
      },
      "Return the launches (program, blocks or items, bytes of shared memory) and the bytes of tables sent, since the last "
      "call.");
}

void register_config(py::module_& m) {
  m.def("isas", &cpu::isas);
  m.def("isa", [] { return std::string(cpu::isa()); });
  m.def("set_isa", [](const std::string& name) { return cpu::set_isa(name); });
  m.def("num_threads", &cpu::num_threads);
  m.def("set_num_threads", &cpu::set_num_threads);
  m.def(
      "set_openmp", [](std::uintptr_t parallel) { cpu::set_openmp(reinterpret_cast<cpu::OpenMpParallel>(parallel)); },
      py::arg("parallel"),
      "Run on the threads of the OpenMP library whose GOMP_parallel stands at this address; 0: on our own.");
  m.def("flush_denormals", &cpu::flush_denormals);
  m.def("set_flush_denormals", &cpu::set_flush_denormals);
  m.def("set_use_exchange_api", &set_use_exchange_api, "Read tensors through torch's C table where there is one. For tests.");
  m.attr("build") = py::dict(
      py::arg("compiler") = GRADSTEP_COMPILER, py::arg("flags") = GRADSTEP_FLAGS, py::arg("build_type") = GRADSTEP_BUILD_TYPE,
      py::arg("pybind11") = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR));
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "Fused optimizer kernels.";
  m.attr("__version__") = GRADSTEP_VERSION;
  register_rules(m);
  register_devices(m);
  register_plan(m);
  register_config(m);
  register_emulation(m);
}
