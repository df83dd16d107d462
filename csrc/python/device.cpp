#include "device.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <set>

#include "../cuda/emulation.h"
#include "array.h"
#include "gil.h"

namespace gradstep::python {
namespace py = pybind11;
namespace {

constexpr const char* kDriverName = "gradstep.device_driver";

device::Driver* driver_in_use = nullptr;  // lives as long as the process

}  // namespace

device::Driver& driver() {
  if (driver_in_use) return *driver_in_use;
  try {
    set_driver_of(py::module_::import("gradstep.cuda").attr("_load_driver")());
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_RuntimeError)) throw;
    throw device::Error(py::str(error.value()).cast<std::string>());
  }
  if (!driver_in_use) throw device::Error("gradstep.cuda has no driver");
  return *driver_in_use;
}

void set_driver(device::Driver* driver) { driver_in_use = driver; }

void set_driver_of(const py::object& capsule) {
  void* pointer = capsule.is_none() ? nullptr : PyCapsule_GetPointer(capsule.ptr(), kDriverName);
  if (!pointer && !capsule.is_none()) throw py::error_already_set();
  set_driver(static_cast<device::Driver*>(pointer));
}

int device_at(const std::byte* memory) { return driver().device_of(memory); }

// ---- steps to come --------------------------------------------------------------------------------------------------------

template <class Function>
void PendingStep::ask(Function function) {
  if (is_done_) return;
  with_name(function_, [&] {
    without_gil([&] {
      const std::lock_guard lock(mutex_);
      if (!is_done_) function();
    });
  });
}

bool PendingStep::is_done() {
  bool done = true;
  ask([&] {
    done = std::all_of(parts_.begin(), parts_.end(), [](const Part& part) { return !part.pending || part.pending->is_done(); });
  });
  return done;
}

const Outcome& PendingStep::wait() {
  ask([&] {
    Outcome all;
    for (Part& part : parts_) {
      const Outcome& outcome = part.pending ? part.pending->wait() : part.outcome;
      if (outcome.skipped()) all.nonfinite = std::min(all.nonfinite, part.items[outcome.nonfinite]);
      all.clip_factor = outcome.clip_factor;  // clipping by the overall norm takes a single part
      if (!outcome.seen.empty()) all.seen.resize(members_.size());
      for (std::size_t i = 0; i < outcome.seen.size(); ++i) all.seen[part.items[i]] = outcome.seen[i];
    }
    outcome_ = std::move(all);
    parts_.clear();
    is_done_ = true;
  });
  return outcome_;
}

py::tuple PendingStep::report() {
  wait();
  return make_report(members_, outcome_);
}

py::tuple make_report(const std::vector<PendingStep::Member>& members, const Outcome& outcome) {
  const auto numbers = [](std::int64_t index, std::int64_t size, double clip_factor, const Sums& sums) {
    const auto& at = sums.at;
    return py::make_tuple(index, size, clip_factor, at[kCameSquares], at[kRuleGradSquares], at[kUpdateSquares],
                          at[kParamSquares], at[kMaxAbs], at[kNans], at[kInfs], at[kZeros]);
  };
  py::list seen;
  Sums all;
  std::int64_t size = 0;
  for (std::size_t i = 0; i < outcome.seen.size(); ++i) {
    const auto& [sums, clip_factor] = outcome.seen[i];
    seen.append(numbers(static_cast<std::int64_t>(members[i].index), members[i].size, clip_factor, sums));
    all.add(sums);
    size += members[i].size;
  }
  return py::make_tuple(!outcome.skipped(), numbers(-1, size, outcome.clip_factor, all), seen);
}

// ---- Python ---------------------------------------------------------------------------------------------------------------

namespace {

// What can't be read is on no device: whoever reads it next says what is wrong with it.
int device_of(const py::handle& array) {
  Holds holds;
  View view;
  try {
    read(array.ptr(), view, holds);
  } catch (Problem&) {
    return kHost;
  }
  return view.device;
}

std::set<int> devices_of(const py::iterable& arrays) {
  std::set<int> devices;
  for (const py::handle array : arrays) devices.insert(device_of(array));
  return devices;
}

}  // namespace

void register_devices(py::module_& m) {
  py::class_<PendingStep, std::shared_ptr<PendingStep>>(m, "PendingStep", "A step on a device whose outcome is still to come.")
      .def_property_readonly("may_be_left_out", &PendingStep::may_be_left_out, "Whether only the device knows if it is.")
      .def("is_done", &PendingStep::is_done, "Whether `wait` would return at once.")
      .def("wait", &PendingStep::report, "Wait for the device; return what a step on the host returns.");
  m.def("set_device_driver", &set_driver_of, py::arg("driver"), "Set the driver of devices; None: have it loaded when needed.");
  m.def(
      "emulate_gpu", [](bool on) { set_driver(on ? &cuda::emulated_driver() : nullptr); }, py::arg("on"),
      "Have the host stand in for two devices, whose memory is its own. For tests.");
  m.def("device_count", [] { return with_name("device_count", [] { return driver().n_devices(); }); });
  m.def(
      "describe_device", [](int device) { return with_name("describe", [&] { return driver().describe(device); }); },
      py::arg("device"));
  m.def("device_of", &device_of, py::arg("array"),
        "The number of the CUDA device that an array is on; -1: in CPU memory, or no array that can be read.");
  m.def("devices_of", &devices_of, py::arg("arrays"), "The devices that arrays are on.");
  m.def("set_pretend_device", &set_pretend_device, py::arg("device"),
        "Read arrays in CPU memory as being on a CUDA device; -1: as what they are. For tests.");
}

}  // namespace gradstep::python
