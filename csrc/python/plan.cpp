#include "plan.h"

#include <utility>

#include "../core/portable.h"
#include "../cpu/run.h"
#include "gil.h"
#include "state_walk.h"

namespace gradstep::python {
namespace py = pybind11;
namespace {

// Elements from which on a step lets other Python threads run meanwhile; under it, handing over the GIL costs more than the
// step.
constexpr std::int64_t kReleaseGil = 1 << 14;

// Parameters whose operands are looked up before the first of them is read.
constexpr std::size_t kBlock = 16;

[[noreturn]] void raise(PyObject* type, const std::string& text) {
  PyErr_SetString(type, text.c_str());
  throw py::error_already_set();
}

}  // namespace

// ---- the call -------------------------------------------------------------------------------------------------------------

struct Plan::Scope {
  explicit Scope(Plan& plan) : plan(plan) {
    if (plan.busy_.exchange(true)) raise(PyExc_RuntimeError, plan.labels_.function + ": is already running in another thread");
    plan.outputs_changed_ = !std::exchange(plan.checked_, false);
  }
  ~Scope() {
    plan.items_.clear();
    plan.groups_.clear();
    plan.pipelines_.clear();
    plan.works_.clear();
    plan.moved_gradients_.clear();
    plan.holds_.clear();
    plan.busy_.store(false);
  }
  Plan& plan;
};

int Plan::n_operands(const Item& item) const {
  return 2 + static_cast<int>(groups_[static_cast<std::size_t>(item.group)].rule->states.size());
}

std::string Plan::label(const Item& item, int operand) const {
  return labels_.operand(operand, *groups_[static_cast<std::size_t>(item.group)].rule, item.index, item.key);
}

void Plan::refuse(const Item& item, int operand, const Problem& problem) const {
  raise(problem.type, labels_.function + ": " + label(item, operand) + " " + problem.text);
}

Plan::Group Plan::parse_group(py::handle kernel) const {
  Group group;
  try {
    group.rule = &parse(kernel, group.settings);
  } catch (Problem& problem) {
    raise(problem.type, labels_.function + ": " + problem.text);
  }
  return group;
}

// Where the states of a parameter lie: in `dict`, as far as they are there; the rest is made.
void Plan::find_states(Item& item, PyObject* dict, const py::object& make_state, std::vector<Fresh>& created) {
  const RuleInfo& rule = *groups_[static_cast<std::size_t>(item.group)].rule;
  py::object missing;  // made only if needed: an object a parameter would call for Python's garbage collector
  const auto find = [&](PyObject* name) -> PyObject* {
    PyObject* value = dict && PyDict_Check(dict) ? PyDict_GetItemWithError(dict, name) : nullptr;
    if (value && value != Py_None) {
      holds_.object(value);
      return value;
    }
    if (!missing) missing = py::list();
    if (PyList_Append(missing.ptr(), name) != 0) throw py::error_already_set();
    return nullptr;
  };
  for (std::size_t k = 0; k < rule.states.size(); ++k) item.operands[2 + k] = find(rule.states[k]);
  PyObject* counter = counts_steps_ ? find(step_name()) : nullptr;

  if (missing) {
    const py::dict fresh = make_state(item.group, py::handle(item.operands[0]), missing);
    holds_.object(fresh.ptr());
    created.push_back({item.key, fresh.ptr()});
    dict = fresh.ptr();
    const auto made = [&](PyObject* name) {
      PyObject* value = fresh[py::handle(name)].ptr();
      holds_.object(value);
      return value;
    };
    for (std::size_t k = 0; k < rule.states.size(); ++k) {
      if (!item.operands[2 + k]) item.operands[2 + k] = made(rule.states[k]);
    }
    if (counts_steps_ && !counter) counter = made(step_name());
  }
  item.dict = dict;
  item.count = counter;
  item.first = rule.has_first && missing;
}

void Plan::step(const py::list& params, const py::object& grads, const py::list& keys, const py::dict& state,
                const py::list& groups, const py::object& make_state) {
  const Scope scope(*this);
  static PyObject* grad_name = PyUnicode_InternFromString("grad");
  const bool from_params = grads.is_none();
  if (!from_params && (!PyList_Check(grads.ptr()) || py::len(grads) != params.size())) {
    raise(PyExc_ValueError, labels_.function + ": grads has " + std::to_string(py::len(grads)) + " arrays, there are " +
                                std::to_string(params.size()) + " parameters");
  }
  StateWalk walk(state.ptr(), holds_);
  items_.reserve(params.size());
  std::vector<Fresh> created;
  std::size_t taken = 0;  // items that have been

  std::size_t index = 0;
  for (const py::handle group : groups) {
    const auto members = py::cast<std::size_t>(py::handle(PyTuple_GetItem(group.ptr(), 0)));
    groups_.push_back(parse_group(PyTuple_GetItem(group.ptr(), 1)));
    for (std::size_t end = index + members; index < end; ++index) {
      PyObject* param = PyList_GetItem(params.ptr(), static_cast<Py_ssize_t>(index));
      if (!param) throw py::error_already_set();
      holds_.object(param);
      PyObject* grad = from_params ? PyObject_GetAttr(param, grad_name)
                                   : Py_XNewRef(PyList_GetItem(grads.ptr(), static_cast<Py_ssize_t>(index)));
      if (!grad) throw py::error_already_set();
      holds_.take(grad);
      if (grad == Py_None) continue;

      PyObject* key = PyList_GetItem(keys.ptr(), static_cast<Py_ssize_t>(index));
      items_.push_back({index, static_cast<int>(groups_.size()) - 1, key, {param, grad}});
      find_states(items_.back(), walk.find(key), make_state, created);
      if (items_.size() - taken == kBlock) take_all(std::exchange(taken, items_.size()));
    }
  }
  take_all(taken);
  run();
  commit(state.ptr(), created);
}

void Plan::update(const char* function, const py::handle& kernel, const py::object& params, const py::object& grads,
                  const py::tuple& states, const py::object& step) {
  thread_local Plan shared({}, Face::kArray, false);
  if (!shared.busy_) return shared.step_arrays(function, kernel, params, grads, states, step);
  // Reading an operand has run Python code, and that comes here.
  Plan({}, Face::kArray, false).step_arrays(function, kernel, params, grads, states, step);
}

void Plan::step_arrays(const char* function, const py::handle& kernel, const py::object& params, const py::object& grads,
                       const py::tuple& states, const py::object& step) {
  const Scope scope(*this);
  labels_.function = function;
  groups_.push_back(parse_group(kernel));
  const RuleInfo& rule = *groups_.back().rule;
  if (states.size() != rule.states.size()) {
    raise(PyExc_TypeError,
          labels_.function + ": takes " + std::to_string(rule.states.size()) + " states, got " + std::to_string(states.size()));
  }

  PyObject* given[kMaxOperands + 1] = {params.ptr(), grads.ptr()};
  const int n = 2 + static_cast<int>(states.size());
  for (int k = 2; k < n; ++k) given[k] = PyTuple_GET_ITEM(states.ptr(), k - 2);
  given[n] = step.ptr();

  const auto add = [&](std::size_t index, PyObject* const* operands, PyObject* number) {
    items_.push_back({index, 0, nullptr});
    Item& item = items_.back();
    std::copy_n(operands, n, item.operands);
    try {
      item.step = step_argument(number);
    } catch (Problem& problem) {
      refuse(item, kMaxOperands, problem);
    }
    item.first = rule.has_first && item.step == 1;
    take(item);
  };

  labels_.face = is_array(params.ptr()) ? Face::kArray : Face::kArrays;
  if (labels_.face == Face::kArray) {
    add(0, given, given[n]);
    return run();
  }

  // Sequences: all of one length; a single step number serves all.
  PyObject* lists[kMaxOperands + 1] = {};
  const bool one_step = step.is_none() || (PyIndex_Check(step.ptr()) && !PySequence_Check(step.ptr()));
  const Item names{0, 0, nullptr};
  for (int k = 0; k < (one_step ? n : n + 1); ++k) {
    const int operand = k == n ? kMaxOperands : k;
    const auto name = [&] {
      const std::string text = label(names, operand);
      return labels_.function + ": " + text.substr(0, text.find('['));
    };
    const bool sequence = !is_array(given[k]) && PySequence_Check(given[k]) && !PyUnicode_Check(given[k]);
    lists[k] = sequence ? PySequence_Tuple(given[k]) : nullptr;  // of our own: reading may run code that changes theirs
    if (!lists[k]) {
      PyErr_Clear();
      raise(PyExc_TypeError, name() + " must be " + (k == 0 ? "an array or a sequence of arrays" : "a sequence, as params is") +
                                 ", got " + Py_TYPE(given[k])->tp_name);
    }
    holds_.take(lists[k]);
    if (PyTuple_GET_SIZE(lists[k]) != PyTuple_GET_SIZE(lists[0])) {
      raise(PyExc_ValueError, name() + " has " + std::to_string(PyTuple_GET_SIZE(lists[k])) +
                                  (k == n ? " numbers" : " arrays") + ", params has " +
                                  std::to_string(PyTuple_GET_SIZE(lists[0])));
    }
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(lists[0]); ++i) {
    PyObject* operands[kMaxOperands] = {};
    for (int k = 0; k < n; ++k) operands[k] = PyTuple_GET_ITEM(lists[k], i);
    add(static_cast<std::size_t>(i), operands, one_step ? step.ptr() : PyTuple_GET_ITEM(lists[n], i));
  }
  run();
}

// ---- check, run, commit ---------------------------------------------------------------------------------------------------

// Reads what items from `first` on hold and checks it, as far as it changed. What a block of items will need is asked for at
// once.
void Plan::take_all(std::size_t first) {
  for (std::size_t i = first; i < items_.size(); ++i) {
    for (int k = 0; k < n_operands(items_[i]); ++k) prefetch<64>(items_[i].operands[k]);
    if (items_[i].count) prefetch<64>(items_[i].count);
  }
  for (std::size_t i = first; i < items_.size(); ++i) {
    for (int k = 0; k < n_operands(items_[i]); ++k) prefetch_array(items_[i].operands[k]);
    if (items_[i].count) prefetch_array(items_[i].count);
  }
  for (std::size_t i = first; i < items_.size(); ++i) take(items_[i]);
}

void Plan::take(Item& item) {
  const int n = n_operands(item);
  try {
    if (item.count) item.step = item.counter.read(item.dict, item.count, holds_) + 1;
  } catch (Problem& problem) {
    refuse(item, kMaxOperands, problem);
  }
  item.first = item.first || (item.count && item.step == 1 && groups_[static_cast<std::size_t>(item.group)].rule->has_first);
  for (int k = 0; k < n; ++k) {
    try {
      read(item.operands[k], views_[k], holds_);
    } catch (Problem& problem) {
      refuse(item, k, problem);
    }
  }
  while (entries_.size() <= item.index) entries_.emplace_back();
  try {
    const Entry::Change change = entries_[item.index].update(views_, n, item.operands);
    const std::size_t at = static_cast<std::size_t>(&item - items_.data());
    if (change == Entry::Change::kAll || at >= active_.size() || active_[at] != item.index) outputs_changed_ = true;
    if (change != Entry::Change::kNone) moved_gradients_.push_back(at);
  } catch (OperandProblem& problem) {
    refuse(item, problem.operand, problem.problem);
  }
}

// Refuses operands that share memory, as far as anything moved.
void Plan::check_overlap() {
  const auto refuse_clash = [&](const Outputs::Clash& clash) {
    if (!clash.found) return;
    const Item &first = items_[static_cast<std::size_t>(clash.first.entry)],
               &second = items_[static_cast<std::size_t>(clash.second.entry)];
    const bool twice = clash.first.operand == 0 && clash.second.operand == 0 && first.operands[0] == second.operands[0];
    refuse(second, clash.second.operand,
           {PyExc_ValueError, twice ? "is " + label(first, 0) + " again: a parameter may be given once"
                                    : "shares memory with " + label(first, clash.first.operand)});
  };

  const bool outputs_changed = outputs_changed_ || items_.size() != active_.size();
  if (outputs_changed || !moved_gradients_.empty()) {
    std::vector<const Entry*> entries;
    for (const Item& item : items_) entries.push_back(&entries_[item.index]);
    if (outputs_changed) {
      refuse_clash(outputs_.assign(entries));
      active_.clear();
      moved_gradients_.clear();
      for (std::size_t i = 0; i < items_.size(); ++i) {
        active_.push_back(items_[i].index);
        moved_gradients_.push_back(i);
      }
    }
    for (const std::size_t i : moved_gradients_) refuse_clash(outputs_.clash_with_gradient(static_cast<int>(i), entries));
  }
  checked_ = true;
}

void Plan::make_pipelines() {
  const FloatEnvironment environment(false);  // constants are rounded to nearest, whatever the caller's mode
  struct Last {
    const Item* item = nullptr;
    const Pipeline* pipeline = nullptr;
  };
  std::vector<Last> last(groups_.size() * 2);  // by group and compute type: most tensors share the step of the one before
  for (const Item& item : items_) {
    const Sweep& sweep = entries_[item.index].sweep();
    Last& at = last[static_cast<std::size_t>(item.group) * 2 + (sweep.compute == Format::kFloat64)];
    if (!at.item || at.item->step != item.step || at.item->first != item.first) {
      cpu::make_pipeline(groups_[static_cast<std::size_t>(item.group)].settings, item.step, item.first, sweep.compute,
                         pipelines_.emplace_back());
      at = {&item, &pipelines_.back()};
    }
    works_.push_back({&sweep, at.pipeline});
  }
}

void Plan::run() {
  check_overlap();
  make_pipelines();
  std::int64_t total = 0;
  for (const Work& work : works_) total += work.sweep->size;
  if (total >= kReleaseGil) {
    without_gil([&] { cpu::run(works_); });
  } else {
    cpu::run(works_);
  }
  bump_versions();
}

void Plan::commit(PyObject* state, const std::vector<Fresh>& created) {
  for (const Item& item : items_) {
    if (item.counter) item.counter.write(item.step);
  }
  for (const auto& [key, fresh] : created) {
    PyObject* dict = PyDict_GetItemWithError(state, key);
    const int failed = dict && PyDict_Check(dict) ? PyDict_Update(dict, fresh) : PyDict_SetItem(state, key, fresh);
    if (failed != 0) throw py::error_already_set();
  }
}

// Tells torch what was changed in place, so that autograd refuses to use saved values that are gone.
void Plan::bump_versions() const {
  PyObject* tensors = nullptr;
  for (const Item& item : items_) {
    for (int k = 0; k < n_operands(item); ++k) {
      if (k == 1 || !is_tensor(item.operands[k])) continue;
      if (!tensors) tensors = PyList_New(0);
      PyList_Append(tensors, item.operands[k]);
    }
  }
  if (!tensors) return;
  const auto list = py::reinterpret_steal<py::list>(tensors);
  static const auto increment = py::object(py::module_::import("torch.autograd.graph").attr("increment_version")).release();
  try {
    increment(list);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError) && !error.matches(PyExc_AttributeError)) throw;
    for (const py::handle tensor : list) increment(tensor);  // torch before 2.6 takes one tensor at a time
  }
}

}  // namespace gradstep::python
