// A plan: the step of one list of parameters, from Python objects to sweeps.
//
//   read every operand -> check what changed -> run (GIL released) -> step counts, new states, version counters, statistics
//
// Everything that can be refused is refused before the run; the run can't fail. Parameters may be on several devices: each
// device's engine gets its own, and counts what it keeps itself; nobody waits for it unless there is something that the host
// has to know.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/step.h"
#include "conditions.h"
#include "counter.h"
#include "device.h"
#include "entry.h"
#include "labels.h"
#include "overlap.h"

namespace gradstep::python {

class Plan {
 public:
  // `counts_steps`: whether a parameter's states have a "step" even where no stage asks for it.
  Plan(std::string function, Face face, bool counts_steps)
      : labels_{std::move(function), face, false}, counts_steps_(counts_steps) {}

  // Steps the optimizer's parameters. `grads` is a list, or None: then each parameter's `.grad`. A None among the gradients
  // leaves that parameter, its states and its count alone. `state` maps the keys (one a parameter) to dicts of states; where
  // states are missing, `make_state(group, param, names)` returns a dict of them, which enters `state` only if the step is
  // carried out. `groups` is a list of (number of parameters, kernel), in the order of the parameters. `conditions` may be
  // None.
  //
  // `scaler`: None, or a list of pairs (loss scale, overflow), one a device: arrays of one number on it, or None. Gradients are
  // divided by the first, and the step is left out if the second is not 0; the host reads neither. `settles`: whether somebody
  // is going to ask if the step was carried out.
  //
  // Returns None, or if statistics are asked for or the step may be left out: (carried out, numbers of all parameters together,
  // a list of the numbers of each): index, size, clip factor, sums. Of a device, a PendingStep of the same, unless the host had
  // to wait anyway.
  pybind11::object step(const pybind11::list& params, const pybind11::object& grads, const pybind11::list& keys,
                        const pybind11::dict& state, const pybind11::list& groups, const pybind11::object& make_state,
                        const pybind11::object& conditions, const pybind11::object& scaler, bool settles);

  // One step, for `function`, of one array or of sequences of arrays, with the states given in the order of the rule's. Calls
  // in one thread share a plan, so those with the same arrays need not be checked again. Returns None, or if the step may be
  // left out, whether it was carried out.
  static pybind11::object update(const char* function, const pybind11::handle& kernel, const pybind11::object& params,
                                 const pybind11::object& grads, const pybind11::tuple& states, const pybind11::object& step,
                                 const pybind11::object& conditions);

 private:
  pybind11::object step_arrays(const char* function, const pybind11::handle& kernel, const pybind11::object& params,
                               const pybind11::object& grads, const pybind11::tuple& states, const pybind11::object& step,
                               const pybind11::object& conditions);

  struct Group {
    Settings settings;
    const RuleInfo* rule = nullptr;
    Roles roles;
    PyObject* lr = nullptr;  // an array on a device
    DeviceNumber device_lr = {};
    int lr_device = kHost;
  };

  // A parameter that takes part in this step. Objects are held by `holds_`.
  struct Item {
    std::size_t index;  // in the lists; of its entry
    int group;
    PyObject* key;
    PyObject* operands[kMaxViews] = {};
    Roles roles = {};
    Moment moment = {};
    int device = kHost;
    DeviceNumbers numbers = {};
    // Where the numbers beside the states stand, and what they are.
    PyObject *dict = nullptr, *fresh = nullptr;  // `fresh`: those that were made for this step
    PyObject *step = nullptr, *ema = nullptr, *swa = nullptr, *norm = nullptr;
    bool step_is_new = false;
    Counter step_count = {}, ema_count = {}, swa_count = {};
    Scalar norm_state = {};
    double norm_squared = 0;
  };

  // States that were made for this step: the parameter's key, and a dict of them.
  struct Fresh {
    PyObject *key, *states;
  };

  // What a device is told in this step beside its items.
  struct Place {
    int device;
    device::Context context = {};
    std::vector<StepItem> items = {};
    std::vector<std::size_t> indices = {};  // of items_
  };

  // The engine of a device, and the driver that has made it.
  struct DeviceEngine {
    device::Driver* driver = nullptr;
    std::shared_ptr<device::Engine> engine;
  };

  // A stream that an array's owner works on.
  struct OwnersStream {
    int device;
    std::int64_t stream;
    bool operator==(const OwnersStream&) const = default;
  };

  // What came of a step: its outcome, or `pending`, from which it can be had later.
  struct Ran {
    Outcome outcome;
    std::shared_ptr<PendingStep> pending;
    bool is_known() const { return !pending; }
    bool may_count() const { return pending || !outcome.skipped(); }  // as far as is known
  };

  // What the host has to know of a step on a device.
  struct Wishes {
    bool settles = true;     // at some time, whether it was carried out
    bool knows = false;      // before the call ends
    bool made_states = false;
  };

  // Empties what belongs to one call, when it ends.
  struct Scope;

  Ran run(const Conditions& conditions, const Wishes& wishes);
  Ran run_places(const Conditions& conditions, const Wishes& wishes);
  void check_places(const Conditions& conditions) const;
  void check_part(const Item& item) const;
  void choose_stream(Place& place, bool made_states);
  device::Engine& engine_of(Place& place);
  void read_scaler(const pybind11::object& scaler);
  void read_lr(Group& group);
  void note_stream(int device, std::int64_t stream);
  std::vector<PendingStep::Member> members() const;
  void take(Item& item);
  void take_numbers(Item& item);
  void take_scales(Item& item);
  void settle_precision(Item& item);
  void take_all(std::size_t first);
  void check_overlap();
  const Group& group_of(const Item& item) const { return groups_[static_cast<std::size_t>(item.group)]; }
  PyObject* object(const Item& item, int view) const;
  int operand_of(const Item& item, int view) const;  // as labels count
  void find_states(Item& item, PyObject* dict, const pybind11::object& make_state, std::vector<Fresh>& created);
  void commit(PyObject* state, const std::vector<Fresh>& created);
  template <class Changed>
  void bump_versions(Changed changed) const;
  void add_group(pybind11::handle kernel, const StepOptions& options);
  pybind11::object report(const Conditions& conditions, const Ran& ran) const;
  [[noreturn]] void refuse_nonfinite(const Outcome& outcome) const;
  [[noreturn]] void refuse(const Item& item, int operand, const Problem& problem) const;
  std::string label(const Item& item, int operand) const;

  Labels labels_;
  bool counts_steps_;
  std::atomic<bool> busy_{false};
  std::deque<Entry> entries_;
  std::vector<std::size_t> active_;  // the entries that took part in the last step
  Outputs outputs_;                  // of those
  bool checked_ = false;             // the last step's operands were all found to be apart

  // Of one call.
  std::vector<Group> groups_;
  std::vector<Item> items_;
  std::vector<PyObject*> further_gradients_;  // of each item, in order
  std::vector<std::size_t> moved_gradients_;  // of items
  bool outputs_changed_ = false;              // since the last check
  std::vector<View> views_;
  std::vector<PyObject*> objects_;
  std::vector<StepItem> step_items_;
  std::vector<Place> places_;               // of devices
  std::vector<std::pair<int, device::Context>> scalers_;
  std::vector<OwnersStream> owners_streams_;
  const StepOptions* options_ = nullptr;
  cpu::Step engine_;
  std::map<int, DeviceEngine> engines_;
  Holds holds_;
};

struct Plan::Scope {
  explicit Scope(Plan& plan) : plan(plan) {
    if (plan.busy_.exchange(true)) raise(PyExc_RuntimeError, plan.labels_.function + ": is already running in another thread");
    plan.outputs_changed_ = !std::exchange(plan.checked_, false);
  }
  ~Scope() {
    plan.items_.clear();
    plan.further_gradients_.clear();
    plan.groups_.clear();
    plan.step_items_.clear();
    plan.places_.clear();
    plan.scalers_.clear();
    plan.owners_streams_.clear();
    plan.moved_gradients_.clear();
    plan.holds_.clear();
    plan.busy_.store(false);
  }
  Plan& plan;
};

}  // namespace gradstep::python
