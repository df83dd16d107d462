// Devices, as plans see them: the driver, streams, and steps that may not have been carried out yet.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "../core/engine.h"

namespace gradstep::python {

// The driver in use. Where none is set, `gradstep.cuda` is asked for one: that is when `gradstep._cuda` is imported, and not
// before. Throws device::Error where this build has none.
device::Driver& driver();

// Sets the driver; null: the next that asks has it loaded.
void set_driver(device::Driver* driver);

// As Python hands it over: a capsule named "gradstep.device_driver", or None.
void set_driver_of(const pybind11::object& capsule);

// On which device memory lies that does not say so itself.
int device_at(const std::byte* memory);

// A step on devices, maybe on the host as well, whose outcome is still to come.
class PendingStep {
 public:
  // What one engine was given.
  struct Part {
    std::vector<std::size_t> items;             // in the step
    std::shared_ptr<device::Engine> engine;     // lives as long as its steps
    std::shared_ptr<device::Pending> pending;   // null: `outcome` is there
    Outcome outcome = {};
  };
  // A tensor of the step: its place among the parameters, its elements.
  struct Member {
    std::size_t index;
    std::int64_t size;
  };

  // `reports`: whether Python is to get numbers. `may_be_left_out`: not known before.
  PendingStep(std::string function, std::vector<Member> members, std::vector<Part> parts, bool may_be_left_out)
      : function_(std::move(function)),
        members_(std::move(members)),
        parts_(std::move(parts)),
        may_be_left_out_(may_be_left_out) {}

  bool may_be_left_out() const { return may_be_left_out_; }
  bool is_done();
  const Outcome& wait();  // without the GIL meanwhile

  // As a plan on the host returns it.
  pybind11::tuple report();

 private:
  template <class Function>
  void ask(Function function);

  std::string function_;
  std::vector<Member> members_;
  std::vector<Part> parts_;
  bool may_be_left_out_;
  std::mutex mutex_;
  std::atomic<bool> is_done_{false};
  Outcome outcome_;
};

// (carried out, numbers of all parameters together, a list of the numbers of each): index, size, clip factor, sums.
pybind11::tuple make_report(const std::vector<PendingStep::Member>& members, const Outcome& outcome);

// Calls `function`, with device::Error as Python's RuntimeError that begins with `name`.
template <class Function>
auto with_name(const std::string& name, Function function) {
  try {
    return function();
  } catch (const device::Error& error) {
    PyErr_SetString(PyExc_RuntimeError, (name + ": " + error.what()).c_str());
    throw pybind11::error_already_set();
  }
}

void register_devices(pybind11::module_& m);

}  // namespace gradstep::python
