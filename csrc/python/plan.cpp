#include "plan.h"

#include <bit>
#include <utility>

#include "../core/factors.h"
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

// The names under which numbers and extras stand in a parameter's states.
struct Names {
  PyObject* step = PyUnicode_InternFromString("step");
  PyObject* ema_count = PyUnicode_InternFromString("ema_count");
  PyObject* swa_count = PyUnicode_InternFromString("swa_count");
  PyObject* norm = PyUnicode_InternFromString("grad_norm_sq");
  PyObject* grad = PyUnicode_InternFromString("grad");
  PyObject* extras[kMaxExtras];
  PyObject* rests[5] = {};  // by Precision

  Names() {
    for (const Precision precision : {Precision::kKahan, Precision::kMaster, Precision::kSplit}) {
      rests[static_cast<int>(precision)] = PyUnicode_InternFromString(rest_name(precision));
    }
    for (int extra = 0; extra < kMaxExtras; ++extra) extras[extra] = PyUnicode_InternFromString(kExtraNames[extra]);
  }
};

const Names& names() {
  static const auto* all = new Names;
  return *all;
}

}  // namespace

// ---- the call -------------------------------------------------------------------------------------------------------------

PyObject* Plan::object(const Item& item, int view) const {
  const int n = item.roles.n_operands();
  if (view < n) return item.operands[view];
  const auto at = static_cast<std::size_t>(&item - items_.data()) * static_cast<std::size_t>(item.roles.n_gradients - 1);
  return further_gradients_[at + static_cast<std::size_t>(view - n)];
}

int Plan::operand_of(const Item& item, int view) const {
  const int n = item.roles.n_operands();
  return view < n ? view : kFurtherGradients + view - n;
}

std::string Plan::label(const Item& item, int operand) const {
  return labels_.operand(operand, *group_of(item).rule, item.roles, item.index, item.key);
}

void Plan::refuse(const Item& item, int operand, const Problem& problem) const {
  raise(problem.type, labels_.function + ": " + label(item, operand) + " " + problem.text);
}

void Plan::add_group(py::handle kernel, const StepOptions& options) {
  Group& group = groups_.emplace_back();
  try {
    group.rule = &parse(kernel, group.settings);
  } catch (Problem& problem) {
    raise(problem.type, labels_.function + ": " + problem.text);
  }
  group.roles.n_states = static_cast<int>(group.rule->states.size());
  group.roles.extras = group.settings.extras();
  group.roles.n_extras = std::popcount(group.roles.extras);
  group.roles.n_gradients = options.n_gradients;
  group.roles.writes_gradients = options.zero_gradient;
  group.roles.counts_elements = group.settings.draws();
  group.roles.precision = group.settings.precision;
  group.roles.unsigned_states = group.rule->unsigned_states;
  group.roles.rows = group.settings.wants_rows();
  group.roles.always_rows = group.settings.agc != kNoLimit;
}

// A precision that keeps something beside the parameter is one of parameters of 16 bits.
void Plan::settle_precision(Item& item) {
  if (item.roles.precision == Precision::kNearest) return;
  View param;
  try {
    read(item.operands[0], param, holds_);
  } catch (Problem& problem) {
    refuse(item, 0, problem);
  }
  if (!param.is_half()) item.roles.precision = Precision::kNearest;
  else if (item.roles.precision == Precision::kSplit && param.kind != 'b') {
    refuse(item, 0, {PyExc_TypeError, "has dtype float16: precision='split' is for bfloat16"});
  }
}

// Where the states of a parameter lie: in `dict`, as far as they are there; the rest is made.
void Plan::find_states(Item& item, PyObject* dict, const py::object& make_state, std::vector<Fresh>& created) {
  const Group& group = group_of(item);
  const RuleInfo& rule = *group.rule;
  const Settings& settings = group.settings;

  // All that there is to be, and where it goes.
  PyObject* wanted[kMaxViews + 4];
  PyObject** to[kMaxViews + 4];
  int n = 0;
  const auto want = [&](PyObject* name, PyObject** where) {
    wanted[n] = name;
    to[n++] = where;
  };
  for (std::size_t k = 0; k < rule.states.size(); ++k) want(rule.states[k], &item.operands[2 + k]);
  const int n_states = n;
  for (int extra = 0; extra < kMaxExtras; ++extra) {
    if (group.roles.extras >> extra & 1) {
      want(names().extras[extra], &item.operands[2 + n]);
    }
  }
  if (item.roles.has_rest()) want(names().rests[static_cast<int>(item.roles.precision)], &item.operands[item.roles.rest()]);
  if (counts_steps_ || settings.wants_step()) want(names().step, &item.step);
  if (settings.has(kEma)) want(names().ema_count, &item.ema);
  if (settings.has(kSwa)) want(names().swa_count, &item.swa);
  if (settings.adaptation == Adaptation::kNovograd) want(names().norm, &item.norm);

  for (int i = 0; i < n; ++i) {
    PyObject* value = dict && PyDict_Check(dict) ? PyDict_GetItemWithError(dict, wanted[i]) : nullptr;
    *to[i] = value == Py_None ? nullptr : value;
  }
  // An average without its count, or a count without its average, begins anew.
  const auto begin_together = [&](Extra extra, PyObject*& count) {
    PyObject** average = nullptr;
    for (int i = n_states; i < n; ++i) {
      if (wanted[i] == names().extras[extra]) average = to[i];
    }
    if (average && (!*average || !count)) *average = count = nullptr;
  };
  if (settings.has(kEma)) begin_together(kEma, item.ema);
  if (settings.has(kSwa)) begin_together(kSwa, item.swa);

  py::object missing;  // made only if needed: an object a parameter would call for Python's garbage collector
  for (int i = 0; i < n; ++i) {
    if (*to[i]) {
      holds_.object(*to[i]);
      continue;
    }
    if (wanted[i] == names().step) item.step_is_new = true;
    if (!missing) missing = py::list();
    if (PyList_Append(missing.ptr(), wanted[i]) != 0) throw py::error_already_set();
    if (i < n_states) item.moment.first = rule.has_first;
  }
  item.dict = dict;
  if (!missing) return;

  const py::dict fresh = make_state(item.group, py::handle(item.operands[0]), missing);
  holds_.object(fresh.ptr());
  created.push_back({item.key, fresh.ptr()});
  for (int i = 0; i < n; ++i) {
    if (*to[i]) continue;
    *to[i] = fresh[py::handle(wanted[i])].ptr();
    holds_.object(*to[i]);
  }
  item.fresh = fresh.ptr();
}

py::object Plan::step(const py::list& params, const py::object& grads, const py::list& keys, const py::dict& state,
                      const py::list& groups, const py::object& make_state, const py::object& given) {
  const Scope scope(*this);
  Conditions conditions = parse_conditions(given);
  conditions.options.weights = conditions.weights.empty() ? nullptr : conditions.weights.data();
  labels_.several_gradients = conditions.options.weights != nullptr;
  const bool from_params = grads.is_none();
  const int n_gradients = conditions.options.n_gradients;
  std::vector<PyObject*> lists;  // one a source
  if (!from_params) {
    if (labels_.several_gradients) {
      for (int i = 0; i < n_gradients; ++i) lists.push_back(PyList_GetItem(grads.ptr(), i));
    } else {
      lists.push_back(grads.ptr());
    }
    for (PyObject* list : lists) {
      if (PyList_Check(list) && PyList_GET_SIZE(list) == static_cast<Py_ssize_t>(params.size())) continue;
      raise(PyExc_ValueError, labels_.function + ": grads has " + std::to_string(py::len(py::handle(list))) +
                                  " arrays, there are " + std::to_string(params.size()) + " parameters");
    }
  }
  StateWalk walk(state.ptr(), holds_);
  items_.reserve(params.size());
  std::vector<Fresh> created;
  std::size_t taken = 0;  // items that have been

  std::size_t index = 0;
  for (const py::handle group : groups) {
    const auto members = py::cast<std::size_t>(py::handle(PyTuple_GetItem(group.ptr(), 0)));
    add_group(PyTuple_GetItem(group.ptr(), 1), conditions.options);
    for (std::size_t end = index + members; index < end; ++index) {
      PyObject* param = PyList_GetItem(params.ptr(), static_cast<Py_ssize_t>(index));
      if (!param) throw py::error_already_set();
      holds_.object(param);
      PyObject* grad = from_params ? PyObject_GetAttr(param, names().grad)
                                   : Py_XNewRef(PyList_GetItem(lists[0], static_cast<Py_ssize_t>(index)));
      if (!grad) throw py::error_already_set();
      holds_.take(grad);
      PyObject* key = PyList_GetItem(keys.ptr(), static_cast<Py_ssize_t>(index));
      if (!key) throw py::error_already_set();
      holds_.object(key);
      const Item item{index, static_cast<int>(groups_.size()) - 1, key, {param, grad}, groups_.back().roles};
      for (int i = 1; i < n_gradients; ++i) {
        PyObject* further = Py_XNewRef(PyList_GetItem(lists[static_cast<std::size_t>(i)], static_cast<Py_ssize_t>(index)));
        if (!further) throw py::error_already_set();
        holds_.take(further);
        if ((further == Py_None) != (grad == Py_None)) {
          const int none = further == Py_None ? kFurtherGradients + i - 1 : 1,
                    some = further == Py_None ? 1 : kFurtherGradients + i - 1;
          refuse(item, none, {PyExc_ValueError, "is None, " + label(item, some) + " is not"});
        }
        if (grad != Py_None) further_gradients_.push_back(further);
      }
      if (grad == Py_None) continue;
      items_.push_back(item);
      items_.back().moment.position = static_cast<std::int64_t>(index);
      settle_precision(items_.back());
      find_states(items_.back(), walk.find(key), make_state, created);
      if (items_.size() - taken == kBlock) take_all(std::exchange(taken, items_.size()));
    }
  }
  take_all(taken);
  const Outcome outcome = run(conditions);
  if (!outcome.skipped()) commit(state.ptr(), created);
  return report(conditions, outcome);
}

void Plan::refuse_nonfinite(const Outcome& outcome) const {
  refuse(items_[outcome.nonfinite], 1, {PyExc_FloatingPointError, "has an element that is not finite"});
}

// What the step saw, for Python.
py::object Plan::report(const Conditions& conditions, const Outcome& outcome) const {
  if (outcome.skipped() && conditions.raises) refuse_nonfinite(outcome);
  if (!conditions.options.checks && !conditions.options.stats) return py::none();
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
    const std::int64_t elements = entries_[items_[i].index].sweep().size;
    seen.append(numbers(static_cast<std::int64_t>(items_[i].index), elements, clip_factor, sums));
    all.add(sums);
    size += elements;
  }
  return py::make_tuple(!outcome.skipped(), numbers(-1, size, outcome.clip_factor, all), seen);
}

// ---- check, run, commit ---------------------------------------------------------------------------------------------------

// Reads what items from `first` on hold and checks it, as far as it changed. What a block of items will need is asked for at
// once.
void Plan::take_all(std::size_t first) {
  const auto for_objects = [&](auto ask) {
    for (std::size_t i = first; i < items_.size(); ++i) {
      const Item& item = items_[i];
      for (int k = 0; k < item.roles.n_arrays(); ++k) ask(item.operands[k]);
      for (PyObject* number : {item.step, item.ema, item.swa}) {
        if (number) ask(number);
      }
    }
  };
  for_objects([](PyObject* object) { prefetch<64>(object); });
  for_objects([](PyObject* object) { prefetch_array(object); });
  for (std::size_t i = first; i < items_.size(); ++i) take(items_[i]);
}

// The numbers beside the states.
void Plan::take_numbers(Item& item) {
  const auto read = [&](auto& number, PyObject* name, PyObject* object, int operand) {
    try {
      PyObject* dict = item.fresh && PyDict_GetItemWithError(item.fresh, name) ? item.fresh : item.dict;
      return number.read(dict, name, object, holds_);
    } catch (Problem& problem) {
      refuse(item, operand, problem);
    }
  };
  Moment& moment = item.moment;
  if (item.step) moment.step = read(item.step_count, names().step, item.step, kStepCount) + 1;
  if (item.ema) moment.ema_count = read(item.ema_count, names().ema_count, item.ema, kEmaCount) + 1;
  if (item.swa) moment.swa_count = read(item.swa_count, names().swa_count, item.swa, kSwaCount) + 1;
  if (item.norm) {
    item.norm_squared = read(item.norm_state, names().norm, item.norm, kNormState);
    if (!item.dict && !item.fresh && !item.norm_state.is_array())
      refuse(item, kNormState, {PyExc_TypeError, "must be an array of one number"});
  }
  // A count that only begins now says nothing of states that are there.
  const bool first_step = item.step && moment.step == 1 && !item.step_is_new;
  moment.first = moment.first || (first_step && group_of(item).rule->has_first);
}

// The scales of states that come as codes.
void Plan::take_scales(Item& item) {
  const RuleInfo& rule = *group_of(item).rule;
  int at = item.roles.n_arrays();
  for (int state = 0; state < item.roles.n_states; ++state) {
    if (!views_[static_cast<std::size_t>(2 + state)].holds_codes()) continue;
    PyObject* name = rule.scales[static_cast<std::size_t>(state)];
    PyObject* scale = item.fresh ? PyDict_GetItemWithError(item.fresh, name) : nullptr;
    if (!scale && item.dict && PyDict_Check(item.dict)) scale = PyDict_GetItemWithError(item.dict, name);
    if (!scale || scale == Py_None) {
      refuse(item, 2 + state,
             {PyExc_TypeError, "has dtype uint8, and there is no '" + py::cast<std::string>(py::handle(name)) + "' beside it"});
    }
    holds_.object(scale);
    item.operands[at++] = scale;
    item.roles.compressed |= 1u << state;
  }
}

void Plan::take(Item& item) {
  take_numbers(item);
  const auto read_views = [&](int begin, int end) {
    if (views_.size() < static_cast<std::size_t>(end)) views_.resize(static_cast<std::size_t>(end));
    objects_.resize(static_cast<std::size_t>(end));
    for (int k = begin; k < end; ++k) {
      const auto at = static_cast<std::size_t>(k);
      objects_[at] = object(item, k);
      try {
        read(objects_[at], views_[at], holds_);
      } catch (Problem& problem) {
        refuse(item, operand_of(item, k), problem);
      }
    }
  };
  const Roles& roles = item.roles;
  const int n = roles.n_arrays();
  read_views(0, n);
  take_scales(item);
  read_views(n, roles.n_views());
  while (entries_.size() <= item.index) entries_.emplace_back();
  try {
    const Entry::Change change = entries_[item.index].update(views_.data(), roles, objects_.data());
    const std::size_t at = static_cast<std::size_t>(&item - items_.data());
    if (change == Entry::Change::kAll || at >= active_.size() || active_[at] != item.index) outputs_changed_ = true;
    if (change != Entry::Change::kNone) moved_gradients_.push_back(at);
    if (views_[0].kind == 'c' && group_of(item).settings.centralize) {
      throw OperandProblem{0, {PyExc_TypeError, "is complex: centralize takes real parameters only"}};
    }
  } catch (OperandProblem& problem) {
    refuse(item, operand_of(item, problem.operand), problem.problem);
  }
  item.moment.has_rows = entries_[item.index].has_rows();
}

// Refuses operands that share memory, as far as anything moved.
void Plan::check_overlap() {
  const auto refuse_clash = [&](const Outputs::Clash& clash) {
    if (!clash.found) return;
    const Item &first = items_[static_cast<std::size_t>(clash.first.entry)],
               &second = items_[static_cast<std::size_t>(clash.second.entry)];
    const int one = operand_of(first, clash.first.operand), other = operand_of(second, clash.second.operand);
    const bool twice = one == 0 && other == 0 && first.operands[0] == second.operands[0];
    refuse(second, other,
           {PyExc_ValueError, twice ? "is " + label(first, 0) + " again: a parameter may be given once"
                                    : "shares memory with " + label(first, one)});
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
    for (const std::size_t i : moved_gradients_) refuse_clash(outputs_.clash_with_gradients(static_cast<int>(i), entries));
  }
  checked_ = true;
}

// Tells torch what was changed in place, so that autograd refuses to use saved values that are gone.
template <class Changed>
void Plan::bump_versions(Changed changed) const {
  PyObject* tensors = nullptr;
  for (const Item& item : items_) {
    const Roles& roles = item.roles;
    for (int k = 0; k < roles.n_views(); ++k) {
      if (!changed(roles, k) || !is_tensor(object(item, k))) continue;
      if (!tensors) tensors = PyList_New(0);
      PyList_Append(tensors, object(item, k));
    }
  }
  if (!tensors) return;
  python::bump_versions(py::reinterpret_steal<py::list>(tensors));
}

Outcome Plan::run(const Conditions& conditions) {
  check_overlap();
  std::int64_t total = 0;
  for (Item& item : items_) {
    const Sweep& sweep = entries_[item.index].sweep();
    const Settings& settings = group_of(item).settings;
    if (settings.has(kSwa) && !swa_takes(settings, item.moment.step)) item.moment.swa_count -= 1;
    step_items_.push_back({&sweep, &settings, item.moment, &item.norm_squared});
    total += sweep.size;
  }
  Outcome outcome;
  const auto run = [&] { outcome = engine_.run(step_items_, conditions.options); };
  if (total >= kReleaseGil) without_gil(run);
  else run();
  if (!outcome.skipped()) bump_versions([](const Roles& roles, int k) { return roles.is_output(k); });
  else if (conditions.options.zero_skipped) bump_versions([](const Roles& roles, int k) { return roles.is_gradient(k); });
  return outcome;
}

void Plan::commit(PyObject* state, const std::vector<Fresh>& created) {
  for (const Item& item : items_) {
    if (item.step_count) item.step_count.write(item.moment.step);
    if (item.ema_count) item.ema_count.write(item.moment.ema_count);
    if (item.swa_count) item.swa_count.write(item.moment.swa_count);
    if (item.norm_state) item.norm_state.write(item.norm_squared);
  }
  for (const auto& [key, fresh] : created) {
    PyObject* dict = PyDict_GetItemWithError(state, key);
    const int failed = dict && PyDict_Check(dict) ? PyDict_Update(dict, fresh) : PyDict_SetItem(state, key, fresh);
    if (failed != 0) throw py::error_already_set();
  }
}

}  // namespace gradstep::python
