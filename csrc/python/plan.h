// A plan: the step of one list of parameters, from Python objects to a sweep.
//
//   read every operand -> check what changed -> pipelines -> run (GIL released) -> step counts, new states, version counters
//
// Everything that can be refused is refused before the run; the run can't fail.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <deque>
#include <string>
#include <vector>

#include "../core/sweep.h"
#include "counter.h"
#include "entry.h"
#include "labels.h"
#include "overlap.h"

namespace gradstep::python {

class Plan {
 public:
  // `counts_steps`: whether a parameter's states have a "step".
  Plan(std::string function, Face face, bool counts_steps) : labels_{std::move(function), face}, counts_steps_(counts_steps) {}

  // Steps the optimizer's parameters. `grads` is a list, or None: then each parameter's `.grad`. A None among the gradients
  // leaves that parameter, its states and its count alone. `state` maps the keys (one a parameter) to dicts of states; where
  // states are missing, `make_state(group, param, names)` returns a dict of them, which enters `state` only if the step is
  // carried out. `groups` is a list of (number of parameters, kernel), in the order of the parameters.
  void step(const pybind11::list& params, const pybind11::object& grads, const pybind11::list& keys,
            const pybind11::dict& state, const pybind11::list& groups, const pybind11::object& make_state);

  // One step, for `function`, of one array or of sequences of arrays, with the states given in the order of the rule's. Calls
  // in one thread share a plan, so those with the same arrays need not be checked again.
  static void update(const char* function, const pybind11::handle& kernel, const pybind11::object& params,
                     const pybind11::object& grads, const pybind11::tuple& states, const pybind11::object& step);

 private:
  void step_arrays(const char* function, const pybind11::handle& kernel, const pybind11::object& params,
                   const pybind11::object& grads, const pybind11::tuple& states, const pybind11::object& step);

  struct Group {
    cpu::Settings settings;
    const RuleInfo* rule = nullptr;
  };

  // A parameter that takes part in this step. Objects are held by `holds_`.
  struct Item {
    std::size_t index;  // in the lists; of its entry
    int group;
    PyObject* key;
    PyObject* operands[kMaxOperands] = {};
    double step = 2;     // the number of this step, from 1
    bool first = false;  // its states hold nothing yet
    PyObject *dict = nullptr, *count = nullptr;  // where the count stands, and what it is
    Counter counter = {};
  };

  // States that were made for this step: the parameter's key, and a dict of them.
  struct Fresh {
    PyObject *key, *states;
  };

  // Empties what belongs to one call, when it ends.
  struct Scope;

  void run();
  void take(Item& item);
  void take_all(std::size_t first);
  void check_overlap();
  int n_operands(const Item& item) const;
  void make_pipelines();
  void find_states(Item& item, PyObject* dict, const pybind11::object& make_state, std::vector<Fresh>& created);
  void commit(PyObject* state, const std::vector<Fresh>& created);
  void bump_versions() const;
  Group parse_group(pybind11::handle kernel) const;
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
  std::vector<std::size_t> moved_gradients_;  // of items
  bool outputs_changed_ = false;              // since the last check
  View views_[kMaxOperands];
  std::deque<Pipeline> pipelines_;
  std::vector<Work> works_;
  Holds holds_;
};

}  // namespace gradstep::python
