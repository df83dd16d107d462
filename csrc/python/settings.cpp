#include "settings.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "../core/stages.h"
#include "../registry.h"
#include "array.h"

namespace gradstep::python {
namespace py = pybind11;
namespace {

constexpr const char* kScaleSuffix = "_scale";

template <class... Rule>
std::vector<RuleInfo> list_rules(List<Rule...>) {
  std::vector<RuleInfo> all;
  const auto add = [&]<class R>() {
    static_assert(R::fields.size() <= kMaxFields);
    RuleInfo info{static_cast<int>(all.size()), R::name, {R::fields.begin(), R::fields.end()}, {}, {}, 0, HasFirst<R>};
    for (const State& state : R::states) {
      info.unsigned_states |= static_cast<std::uint32_t>(state.is_unsigned) << info.states.size();
      info.states.push_back(PyUnicode_InternFromString(state.name));
      info.scales.push_back(PyUnicode_InternFromString((state.name + std::string(kScaleSuffix)).c_str()));
    }
    all.push_back(std::move(info));
  };
  (add.template operator()<Rule>(), ...);
  return all;
}

// A stage as Python names it, with what its numbers do to the settings.
struct StageInfo {
  const char* name;
  std::vector<Field> fields;
  void (*set)(Settings&, const double* values);
};

void set_decay(Settings& settings, Decay decay, double weight_decay, bool independent) {
  if (settings.decay != Decay::kNone) type_problem("takes one decay, got a second");
  settings.decay = decay;
  settings.weight_decay = weight_decay;
  settings.independent_decay = independent;
}

template <class Stage>
std::vector<Field> fields_of() {
  return {Stage::fields.begin(), Stage::fields.end()};
}

// One stage of a list that is compiled: its index and its values.
template <class... Stage>
void add_stages(std::vector<StageInfo>& all, List<Stage...>, auto set) {
  (all.push_back({Stage::name, fields_of<Stage>(), set.template operator()<Stage>()}), ...);
}

template <class Stage, class... Others>
constexpr int index_in(List<Others...>) {
  int index = 0, found = -1;
  ((std::is_same_v<Stage, Others> ? found = index : 0, ++index), ...);
  return found;
}

template <class Stage, class List>
void add_stage(Chosen<List>& chosen, List list, const double* values) {
  auto& [index, to] = chosen.stages[chosen.size++];
  static_assert(Stage::fields.size() <= kMaxStageFields);
  index = index_in<Stage>(list);
  std::copy_n(values, Stage::fields.size(), to);
}

std::vector<StageInfo> make_stages() {
  constexpr Range kAny = Range::kFinite, kNotNegative = Range::kNonNegative;
  std::vector<StageInfo> all;
  all.push_back({"scale", {{"grad_scale", kAny}}, [](Settings& s, const double* x) { s.scale = x[0]; }});
  add_stages(all, GradientStages{}, []<class Stage>() -> void (*)(Settings&, const double*) {
    return [](Settings& s, const double* x) { add_stage<Stage>(s.gradient_stages, GradientStages{}, x); };
  });
  all.push_back({"agc", {{"agc", kNotNegative}, {"agc_eps", kNotNegative}}, [](Settings& s, const double* x) {
                   s.agc = x[0];
                   s.agc_eps = x[1];
                 }});
  all.push_back({"clip_norm_per_tensor", {{"clip_norm_per_tensor", kNotNegative}}, [](Settings& s, const double* x) {
                   s.clip_norm = x[0];
                 }});
  all.push_back({"centralize", {}, [](Settings& s, const double*) { s.centralize = true; }});
  all.push_back({"noise", {{"noise", kNotNegative}, {"noise_decay", kNotNegative}}, [](Settings& s, const double* x) {
                   s.noise = x[0];
                   s.noise_decay = x[1];
                 }});
  all.push_back({"seed", {{"seed", kNotNegative}}, [](Settings& s, const double* x) { s.seed = x[0]; }});
  all.push_back({"precision", {{"precision", kNotNegative}}, [](Settings& s, const double* x) {
                   s.precision = static_cast<Precision>(static_cast<int>(x[0]));
                 }});
  all.push_back({"stochastic_states", {}, [](Settings& s, const double*) { s.states_by_chance = true; }});
  all.push_back({"lars", {{"trust_coefficient", kNotNegative}, {"eps", kNotNegative}}, [](Settings& s, const double* x) {
                   s.adaptation = Adaptation::kLars;
                   s.coefficient = x[0];
                   s.adaptation_eps = x[1];
                 }});
  all.push_back({"novograd", {{"betas[1]", Range::kBelowOne}, {"eps", kNotNegative}}, [](Settings& s, const double* x) {
                   s.adaptation = Adaptation::kNovograd;
                   s.norm_beta = x[0];
                   s.adaptation_eps = x[1];
                 }});
  const std::vector<Field> weight_decay{{"weight_decay", kNotNegative}};
  all.push_back(
      {"coupled_decay", weight_decay, [](Settings& s, const double* x) { set_decay(s, Decay::kCoupled, x[0], false); }});
  all.push_back(
      {"decoupled_decay", weight_decay, [](Settings& s, const double* x) { set_decay(s, Decay::kDecoupled, x[0], false); }});
  all.push_back(
      {"independent_decay", weight_decay, [](Settings& s, const double* x) { set_decay(s, Decay::kDecoupled, x[0], true); }});
  all.push_back({"cautious", {}, [](Settings& s, const double*) { s.cautious = true; }});
  all.push_back({"trust_ratio",
                 {{"trust_ratio[0]", kNotNegative}, {"trust_ratio[1]", Range::kNumber}, {"decay_in_ratio", kAny}},
                 [](Settings& s, const double* x) {
                   s.trust_ratio = true;
                   s.trust_low = x[0];
                   s.trust_high = x[1];
                   s.decay_in_ratio = x[2] != 0;
                 }});
  add_stages(all, ParamStages{}, []<class Stage>() -> void (*)(Settings&, const double*) {
    return [](Settings& s, const double* x) { add_stage<Stage>(s.param_stages, ParamStages{}, x); };
  });
  all.push_back({"group_lasso", {{"group_lasso", kNotNegative}}, [](Settings& s, const double* x) { s.group_lasso = x[0]; }});
  all.push_back({"max_norm", {{"max_norm", kNotNegative}}, [](Settings& s, const double* x) { s.max_norm = x[0]; }});
  all.push_back(
      {"lookahead", {{"lookahead[0]", Range::kPositive}, {"lookahead[1]", kNotNegative}}, [](Settings& s, const double* x) {
         s.lookahead_steps = x[0];
         s.lookahead_alpha = x[1];
       }});
  all.push_back({"ema", {{"ema_decay", Range::kBelowOne}, {"ema_correction", kNotNegative}}, [](Settings& s, const double* x) {
                   s.ema_decay = x[0];
                   s.ema_correction = static_cast<EmaCorrection>(x[1]);
                 }});
  all.push_back({"swa", {{"swa[0]", kNotNegative}, {"swa[1]", Range::kPositive}}, [](Settings& s, const double* x) {
                   s.swa_start = x[0];
                   s.swa_every = x[1];
                 }});
  return all;
}

const std::vector<StageInfo>& stages() {
  static const auto* all = new std::vector<StageInfo>(make_stages());
  return *all;
}

std::string number_text(double x) {
  char* text = PyOS_double_to_string(x, 'r', 0, Py_DTSF_ADD_DOT_0, nullptr);
  std::string copy(text);
  PyMem_Free(text);
  return copy;
}

double number(PyObject* object, const Field& field) {
  const double x = PyBool_Check(object) ? -1 : PyFloat_AsDouble(object);
  if (x == -1 && (PyBool_Check(object) || PyErr_Occurred())) {
    PyErr_Clear();
    type_problem(std::string(field.name) + " must be a number, got " + py::repr(object).cast<std::string>());
  }
  const auto refuse = [&](const char* rule) {
    value_problem(std::string(field.name) + " must be " + rule + ", got " + number_text(x));
  };
  if (field.range == Range::kNonNegative && !(x >= 0)) refuse(">= 0");
  if (field.range == Range::kPositive && !(x > 0)) refuse("> 0");
  if (field.range == Range::kBelowOne && !(x >= 0 && x < 1)) refuse("in [0, 1)");
  if (field.range == Range::kNumber && std::isnan(x)) refuse("a number");
  if (field.range != Range::kNumber && !std::isfinite(x)) refuse("finite");
  return x;
}

// The numbers of `tuple` from `first` on, one a field.
void parse_values(PyObject* tuple, Py_ssize_t first, const std::vector<Field>& fields, double* values) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) - first != static_cast<Py_ssize_t>(fields.size())) {
    std::string names;
    for (const Field& field : fields) names += (names.empty() ? "" : ", ") + std::string(field.name);
    type_problem("takes the values (" + names + "), got " + py::repr(tuple).cast<std::string>());
  }
  for (std::size_t i = 0; i < fields.size(); ++i) {
    values[i] = number(PyTuple_GET_ITEM(tuple, first + static_cast<Py_ssize_t>(i)), fields[i]);
  }
}

void parse_stage(PyObject* stage, Settings& settings, std::uint64_t& seen) {
  PyObject* name = PyTuple_Check(stage) && PyTuple_GET_SIZE(stage) > 0 ? PyTuple_GET_ITEM(stage, 0) : Py_None;
  std::uint64_t bit = 1;
  for (const StageInfo& info : stages()) {
    const std::uint64_t here = std::exchange(bit, bit << 1);
    if (!PyUnicode_Check(name) || PyUnicode_CompareWithASCIIString(name, info.name) != 0) continue;
    if (seen & here) type_problem("takes a stage once, got " + py::repr(stage).cast<std::string>() + " as a second");
    seen |= here;
    double values[kMaxFields];
    parse_values(stage, 1, info.fields, values);
    info.set(settings, values);
    return;
  }
  type_problem("has no stage " + py::repr(stage).cast<std::string>());
}

// The learning rate among a rule's values, if it is an array on a device; else null.
PyObject* find_device_lr(PyObject* values) {
  if (!PyTuple_Check(values) || PyTuple_GET_SIZE(values) == 0) return nullptr;
  PyObject* lr = PyTuple_GET_ITEM(values, 0);
  if (PyFloat_Check(lr) || PyLong_Check(lr) || !is_array(lr)) return nullptr;
  Holds holds;
  View view;
  try {
    read(lr, view, holds);
  } catch (Problem&) {
    return nullptr;  // whoever takes it for a number will say what it is
  }
  return view.device == kHost ? nullptr : lr;
}

std::vector<std::string> names_of(const std::vector<Field>& fields) {
  std::vector<std::string> names;
  for (const Field& field : fields) names.emplace_back(field.name);
  return names;
}

}  // namespace

std::vector<std::string> RuleInfo::field_names() const { return names_of(fields); }

std::vector<std::string> RuleInfo::state_names() const {
  std::vector<std::string> names;
  for (PyObject* state : states) names.push_back(py::cast<std::string>(py::handle(state)));
  return names;
}

const std::vector<RuleInfo>& rules() {
  static const auto* all = new std::vector<RuleInfo>(list_rules(Rules{}));
  return *all;
}

std::vector<std::string> unsigned_states() {
  std::vector<std::string> names;
  for (const RuleInfo& rule : rules()) {
    for (std::size_t k = 0; k < rule.states.size(); ++k) {
      if (rule.unsigned_states >> k & 1) names.push_back(py::cast<std::string>(py::handle(rule.states[k])));
    }
  }
  return names;
}

std::vector<std::pair<std::string, std::vector<std::string>>> stage_names() {
  std::vector<std::pair<std::string, std::vector<std::string>>> names;
  for (const StageInfo& stage : stages()) names.emplace_back(stage.name, names_of(stage.fields));
  return names;
}

const RuleInfo& parse(py::handle kernel, Settings& settings, PyObject*& device_lr) {
  if (!PyTuple_Check(kernel.ptr()) || PyTuple_GET_SIZE(kernel.ptr()) != 3) {
    type_problem("takes (rule, values, stages), got " + py::repr(kernel).cast<std::string>());
  }
  const auto& rule = py::cast<const RuleInfo&>(py::handle(PyTuple_GET_ITEM(kernel.ptr(), 0)));
  settings = {};
  settings.rule = rule.index;
  auto values = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(kernel.ptr(), 1));
  device_lr = find_device_lr(values.ptr());
  if (device_lr) {  // any number serves in its place
    const auto others = py::reinterpret_steal<py::object>(PyTuple_GetSlice(values.ptr(), 1, PyTuple_GET_SIZE(values.ptr())));
    values = py::make_tuple(1.0) + others;
  }
  parse_values(values.ptr(), 0, rule.fields, settings.values);
  PyObject* given = PyTuple_GET_ITEM(kernel.ptr(), 2);
  if (!PyTuple_Check(given)) type_problem("takes a tuple of stages, got " + py::repr(given).cast<std::string>());
  std::uint64_t seen = 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); ++i) parse_stage(PyTuple_GET_ITEM(given, i), settings, seen);
  return rule;
}

}  // namespace gradstep::python
