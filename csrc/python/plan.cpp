#include "plan.h"

#include <algorithm>
#include <bit>
#include <set>
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
    group.rule = &parse(kernel, group.settings, group.lr);
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
  read_lr(group);
  options_ = &options;
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
                      const py::list& groups, const py::object& make_state, const py::object& given, const py::object& scaler,
                      bool settles) {
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
  read_scaler(scaler);
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
  const Ran ran = run(conditions, {settles, false, !created.empty()});
  if (ran.may_count()) commit(state.ptr(), created);
  return report(conditions, ran);
}

void Plan::refuse_nonfinite(const Outcome& outcome) const {
  refuse(items_[outcome.nonfinite], 1, {PyExc_FloatingPointError, "has an element that is not finite"});
}

std::vector<PendingStep::Member> Plan::members() const {
  std::vector<PendingStep::Member> members;
  for (const Item& item : items_) members.push_back({item.index, entries_[item.index].sweep().size});
  return members;
}

// What the step saw, for Python.
py::object Plan::report(const Conditions& conditions, const Ran& ran) const {
  if (ran.pending) return py::cast(ran.pending);
  if (ran.outcome.skipped() && conditions.raises) refuse_nonfinite(ran.outcome);
  if (!conditions.options.checks && !conditions.options.stats && scalers_.empty()) return py::none();
  return make_report(members(), ran.outcome);
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
  DeviceNumbers& numbers = item.numbers;
  numbers = {item.step_count.on_device(), item.ema_count.on_device(), item.swa_count.on_device(), item.norm_state.on_device()};
  // A count that only begins now says nothing of states that are there.
  if (numbers.step) {
    numbers.first_at_1 = group_of(item).rule->has_first && !item.step_is_new;
    return;
  }
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
  item.device = views_[0].device;
  const auto take_place = [&](const Number& number, int operand) {
    if (number.device() == kHost) return;
    if (number.device() != item.device) {
      refuse(item, operand,
             {PyExc_ValueError, "is " + place_text(number.device()) + ", its parameter is " + place_text(item.device)});
    }
    note_stream(number.device(), number.stream());
  };
  take_place(item.step_count, kStepCount);
  take_place(item.ema_count, kEmaCount);
  take_place(item.swa_count, kSwaCount);
  take_place(item.norm_state, kNormState);
  bool has_parts = false;
  for (int k = 0; k < roles.n_views(); ++k) {
    const View& view = views_[static_cast<std::size_t>(k)];
    has_parts = has_parts || view.is_part;
    if (view.stream != 0) note_stream(view.device, view.stream);
  }
  if (has_parts) check_part(item);
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

Plan::Ran Plan::run(const Conditions& conditions, const Wishes& wishes) {
  check_overlap();
  std::int64_t total = 0;
  bool on_devices = false;
  for (Item& item : items_) {
    const Settings& settings = group_of(item).settings;
    const bool counts = settings.has(kSwa) && !item.numbers.swa_count;
    if (counts && !swa_takes(settings, item.moment.step)) item.moment.swa_count -= 1;
    total += entries_[item.index].sweep().size;
    on_devices = on_devices || item.device != kHost;
  }
  if (on_devices || !scalers_.empty()) return run_places(conditions, wishes);
  for (Item& item : items_) {
    if (group_of(item).lr) check_places(conditions);
    step_items_.push_back({&entries_[item.index].sweep(), &group_of(item).settings, item.moment, &item.norm_squared});
  }
  Ran ran;
  const auto run = [&] { ran.outcome = engine_.run(step_items_, conditions.options); };
  if (total >= kReleaseGil) without_gil(run);
  else run();
  if (!ran.outcome.skipped()) bump_versions([](const Roles& roles, int k) { return roles.is_output(k); });
  else if (conditions.options.zero_skipped) bump_versions([](const Roles& roles, int k) { return roles.is_gradient(k); });
  return ran;
}

// ---- devices --------------------------------------------------------------------------------------------------------------

namespace {

// A stream as `__cuda_array_interface__` and torch number it; the default one has two numbers.
void* as_stream(std::int64_t number) {
  return number == 1 ? nullptr : reinterpret_cast<void*>(static_cast<std::intptr_t>(number));
}

// What looks at a whole tensor, of which this process may have a part only; null: nothing.
const char* looks_at_whole(const Settings& settings, const StepOptions& options, bool has_rows, bool are_whole) {
  if (options.clips()) return "clip_norm";
  if (options.checks && !options.leave_out) return "on_nonfinite";
  if (options.stats) return "stats";
  if (settings.clip_norm != kNoLimit) return "clip_norm_per_tensor";
  if (settings.adaptation != Adaptation::kNone) return "a norm for each tensor";
  if (settings.trust_ratio) return "trust_ratio";
  if (settings.cautious) return "cautious";
  if (settings.draws()) return "what is drawn at random";
  if (settings.agc != kNoLimit && !(has_rows && are_whole)) return "agc";
  if (settings.wants_rows() && has_rows && !are_whole) return "a stage that goes by rows";
  return nullptr;
}

}  // namespace

// DTensors: gradients and states have to be cut up as their parameter is, and nothing may look at more than the part that is
// here.
void Plan::check_part(const Item& item) const {
  const auto placements_of = [&](int k) { return py::getattr(objects_[static_cast<std::size_t>(k)], "placements"); };
  const auto mesh_of = [&](int k) { return py::getattr(objects_[static_cast<std::size_t>(k)], "device_mesh"); };
  const auto text = [](const py::object& object) { return py::repr(object).cast<std::string>(); };
  const bool is_part = views_[0].is_part;
  const py::object placements = is_part ? placements_of(0) : py::none();
  for (int k = 1; k < item.roles.n_views(); ++k) {
    std::string problem;
    if (views_[static_cast<std::size_t>(k)].is_part != is_part) {
      problem = is_part ? "is no DTensor, its parameter is" : "is a DTensor, its parameter is not";
    } else if (is_part && !placements_of(k).equal(placements)) {
      problem = "has the placements " + text(placements_of(k)) + ", its parameter has " + text(placements);
    } else if (is_part && !mesh_of(k).equal(mesh_of(0))) {
      problem = "is on another mesh than its parameter";
    }
    if (!problem.empty()) refuse(item, operand_of(item, k), {PyExc_ValueError, problem});
  }
  bool is_whole = true, rows_are_whole = true;
  for (const py::handle placement : is_part ? py::tuple(placements) : py::tuple()) {
    if (placement.attr("is_replicate")().cast<bool>()) continue;
    is_whole = false;
    rows_are_whole = rows_are_whole && placement.attr("is_shard")(0).cast<bool>();
  }
  const bool has_rows = views_[0].ndim - (views_[0].kind == 'c') >= 2;
  const char* what = is_whole ? nullptr : looks_at_whole(group_of(item).settings, *options_, has_rows, rows_are_whole);
  if (what) {
    refuse(item, 0, {PyExc_ValueError, "has the placements " + text(placements) + ": " + what + " takes whole tensors only"});
  }
}

void Plan::read_lr(Group& group) {
  if (!group.lr) return;
  View view;
  try {
    read(group.lr, view, holds_);
    group.device_lr = device_number(view, group.lr);
  } catch (Problem& problem) {
    raise(problem.type, labels_.function + ": lr " + problem.text);
  }
  group.lr_device = view.device;
  note_stream(view.device, view.stream);
}

void Plan::read_scaler(const py::object& scaler) {
  if (scaler.is_none()) return;
  for (const py::handle both : scaler) {
    device::Context context;
    int device = kHost;
    DeviceNumber* to = &context.grad_scale;
    for (const py::handle array : both) {
      DeviceNumber& number = *std::exchange(to, &context.found_inf);
      if (array.is_none()) continue;
      View view;
      try {
        read(array.ptr(), view, holds_);
        number = device_number(view, array.ptr());
      } catch (Problem& problem) {
        raise(problem.type, labels_.function + ": a number of the gradient scaler " + problem.text);
      }
      device = view.device;
    }
    scalers_.emplace_back(device, context);
  }
}

void Plan::note_stream(int device, std::int64_t stream) {
  const OwnersStream noted{device, stream};
  if (device == kHost || stream == 0) return;
  if (std::find(owners_streams_.begin(), owners_streams_.end(), noted) == owners_streams_.end())
    owners_streams_.push_back(noted);
}

// Refuses what devices can't do together, or not at all.
void Plan::check_places(const Conditions& conditions) const {
  const StepOptions& options = conditions.options;
  std::set<int> devices;
  for (const Item& item : items_) {
    devices.insert(item.device);
    const Group& group = group_of(item);
    const auto refuse_lr = [&] {
      return labels_.function + ": lr is " + place_text(group.lr_device) + ", " + label(item, 0) + " is " +
             place_text(item.device) + ": give lr as a number, or a group for each device";
    };
    if (group.lr && group.lr_device != item.device) raise(PyExc_ValueError, refuse_lr());
    if (item.numbers.step && item.swa && !item.numbers.swa_count) {
      refuse(item, kSwaCount,
             {PyExc_ValueError,
              "is in CPU memory, " + label(item, kStepCount) + " is " + place_text(item.device) + ": both have to be there"});
    }
    const auto has_scaler = [&](const auto& scaler) { return scaler.first == item.device; };
    if (!scalers_.empty() && std::none_of(scalers_.begin(), scalers_.end(), has_scaler)) {
      raise(PyExc_ValueError, labels_.function + ": the gradient scaler has no numbers for " + label(item, 0) + ", which is " +
                                  place_text(item.device));
    }
  }
  const char* of_all = options.clips() ? "clip_norm"
                       : options.checks && !options.leave_out
                           ? (conditions.raises ? "on_nonfinite='raise'" : "on_nonfinite='skip'")
                           : nullptr;
  if (of_all && devices.size() > 1) {
    std::string text;
    for (const int device : devices) text += (text.empty() ? "" : " and ") + place_text(device);
    raise(PyExc_ValueError, labels_.function + ": " + of_all + " looks at all gradients together, and parameters are " + text +
                                ": take an optimizer for each");
  }
  if (!cpu::flush_denormals() && *devices.rbegin() != kHost) {
    raise(PyExc_RuntimeError, labels_.function + ": " + label(items_.front(), 0) + " is " + place_text(items_.front().device) +
                                  ", where denormals are always flushed: config.denormals must be 'flush'");
  }
}

// The stream on which a device carries the step out. It waits for what others have given to theirs.
void Plan::choose_stream(Place& place, bool made_states) {
  static const auto streams_of = py::object(py::module_::import("gradstep.cuda").attr("_streams")).release();
  const Item& first = items_[place.indices.front()];
  const auto [number, of_library] =
      streams_of(place.device, py::handle(first.operands[0]), places_.size()).cast<std::pair<std::int64_t, std::int64_t>>();
  place.context.stream = as_stream(number);
  if (made_states) note_stream(place.device, of_library == 0 ? 1 : of_library);
  for (const auto& [device, other] : owners_streams_) {
    if (device == place.device && as_stream(other) != place.context.stream) {
      driver().wait_for(device, place.context.stream, as_stream(other));
    }
  }
}

device::Engine& Plan::engine_of(Place& place) {
  DeviceEngine& kept = engines_[place.device];
  if (kept.driver != &driver()) {
    if (const int n = driver().n_devices(); place.device >= n) {
      throw device::Error("there is no cuda:" + std::to_string(place.device) + ", there are " + std::to_string(n) + " devices");
    }
    kept = {&driver(), driver().make_engine(place.device)};
  }
  return *kept.engine;
}

// A step of parameters on devices, and on the host beside.
Plan::Ran Plan::run_places(const Conditions& conditions, const Wishes& wishes) {
  if (items_.empty()) return {};
  check_places(conditions);
  const StepOptions& options = conditions.options;
  const bool may_be_left_out = options.checks || !scalers_.empty();
  // The host waits where there is something that it has to know before it goes on: to count, to keep new states or not.
  bool waits = wishes.knows || conditions.raises || options.leave_out || (may_be_left_out && wishes.made_states);
  std::vector<std::size_t> on_host;
  for (std::size_t i = 0; i < items_.size(); ++i) {
    Item& item = items_[i];
    const Group& group = group_of(item);
    StepItem step_item{&entries_[item.index].sweep(), &group.settings, item.moment, &item.norm_squared};
    if (item.device == kHost) {
      step_items_.push_back(step_item);
      on_host.push_back(i);
      continue;
    }
    const auto is_hosts = [](const Number& number) { return number && number.device() == kHost; };
    waits = waits || (may_be_left_out && (is_hosts(item.step_count) || is_hosts(item.ema_count) || is_hosts(item.swa_count)));
    const bool hosts_norm = group.settings.adaptation == Adaptation::kNovograd && !item.numbers.norm;
    waits = waits || hosts_norm;
    if (!hosts_norm) step_item.norm_state = nullptr;
    step_item.numbers = item.numbers;
    step_item.lr = group.device_lr;
    auto place = std::find_if(places_.begin(), places_.end(), [&](const Place& at) { return at.device == item.device; });
    if (place == places_.end()) place = places_.insert(place, Place{item.device});
    place->items.push_back(step_item);
    place->indices.push_back(i);
  }
  const bool keeps = waits || options.stats || (may_be_left_out && wishes.settles);

  std::vector<PendingStep::Part> parts;
  with_name(labels_.function, [&] {
    for (Place& place : places_) {
      for (const auto& [device, context] : scalers_) {
        if (device == place.device) place.context = context;
      }
      choose_stream(place, wishes.made_states);
      engine_of(place);
    }
    for (Place& place : places_) {
      device::Engine& engine = engine_of(place);
      PendingStep::Part part{place.indices, engines_[place.device].engine, nullptr};
      without_gil([&] { part.pending = engine.run(place.items, options, place.context, keeps); });
      parts.push_back(std::move(part));
      for (const auto& [device, other] : owners_streams_) {  // whoever looks at their arrays next finds the step done
        if (device != place.device || as_stream(other) == place.context.stream) continue;
        driver().wait_for(device, as_stream(other), place.context.stream);
      }
    }
  });
  if (!on_host.empty()) {
    PendingStep::Part part{std::move(on_host), nullptr, nullptr};
    without_gil([&] { part.outcome = engine_.run(step_items_, options); });
    parts.push_back(std::move(part));
  }

  Ran ran;
  if (keeps) ran.pending = std::make_shared<PendingStep>(labels_.function, members(), std::move(parts), may_be_left_out);
  if (waits) ran = {ran.pending->wait(), nullptr};
  if (ran.may_count()) bump_versions([](const Roles& roles, int k) { return roles.is_output(k); });
  else if (options.zero_skipped) bump_versions([](const Roles& roles, int k) { return roles.is_gradient(k); });
  return ran;
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
