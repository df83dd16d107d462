#include "settings.h"

#include <cmath>

#include "../core/stages.h"
#include "../registry.h"
#include "array.h"

namespace gradstep::python {
namespace py = pybind11;
namespace {

template <class... Rule>
std::vector<RuleInfo> list_rules(List<Rule...>) {
  std::vector<RuleInfo> all;
  const auto add = [&]<class R>() {
    RuleInfo info{static_cast<int>(all.size()), R::name, {R::fields.begin(), R::fields.end()}, {}, HasFirst<R>};
    for (const char* state : R::states) info.states.push_back(PyUnicode_InternFromString(state));
    all.push_back(std::move(info));
  };
  (add.template operator()<Rule>(), ...);
  return all;
}

struct StageInfo {
  const char* name;
  std::vector<Field> fields;
};

template <class... Stage>
std::vector<StageInfo> list_stages(List<Stage...>) {
  return {{Stage::name, {Stage::fields.begin(), Stage::fields.end()}}...};
}

const std::vector<StageInfo>& gradient_stages() {
  static const auto* stages = new std::vector<StageInfo>(list_stages(GradientStages{}));
  return *stages;
}

struct DecayInfo {
  Decay decay;
  StageInfo stage;
};

const std::vector<DecayInfo>& decays() {
  static const auto* decays = new std::vector<DecayInfo>{{Decay::kCoupled, list_stages(List<CoupledDecay>{}).front()},
                                                         {Decay::kDecoupled, list_stages(List<DecoupledDecay>{}).front()}};
  return *decays;
}

std::string number_text(double x) {
  char* text = PyOS_double_to_string(x, 'r', 0, Py_DTSF_ADD_DOT_0, nullptr);
  std::string copy(text);
  PyMem_Free(text);
  return copy;
}

double number(PyObject* object, const Field& field) {
  const double x = PyFloat_AsDouble(object);
  if (x == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    type_problem(std::string(field.name) + " must be a number, got " + py::repr(object).cast<std::string>());
  }
  const auto refuse = [&](const char* rule) {
    value_problem(std::string(field.name) + " must be " + rule + ", got " + number_text(x));
  };
  if (field.range == Range::kNonNegative && !(x >= 0)) refuse(">= 0");
  if (field.range == Range::kBelowOne && !(x >= 0 && x < 1)) refuse("in [0, 1)");
  if (!std::isfinite(x)) refuse("finite");
  return x;
}

// The numbers of `tuple` from `first` on, one a field.
void parse_values(PyObject* tuple, Py_ssize_t first, const std::vector<Field>& fields, std::vector<double>& values) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) - first != static_cast<Py_ssize_t>(fields.size())) {
    std::string names;
    for (const Field& field : fields) names += (names.empty() ? "" : ", ") + std::string(field.name);
    type_problem("takes the values (" + names + "), got " + py::repr(tuple).cast<std::string>());
  }
  values.clear();
  for (std::size_t i = 0; i < fields.size(); ++i) {
    values.push_back(number(PyTuple_GET_ITEM(tuple, first + static_cast<Py_ssize_t>(i)), fields[i]));
  }
}

void parse_stage(PyObject* stage, cpu::Settings& settings) {
  PyObject* name = PyTuple_Check(stage) && PyTuple_GET_SIZE(stage) > 0 ? PyTuple_GET_ITEM(stage, 0) : Py_None;
  const auto is = [&](const StageInfo& info) {
    return PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, info.name) == 0;
  };
  for (const auto& [decay, info] : decays()) {
    if (!is(info)) continue;
    if (settings.decay != Decay::kNone)
      type_problem("takes one decay, got " + py::repr(stage).cast<std::string>() + " as a second");
    std::vector<double> values;
    parse_values(stage, 1, info.fields, values);
    settings.decay = decay;
    settings.weight_decay = values[0];
    return;
  }
  if (settings.decay != Decay::kNone)
    type_problem("takes decays last, got " + py::repr(stage).cast<std::string>() + " after one");
  for (std::size_t i = 0; i < gradient_stages().size(); ++i) {
    if (!is(gradient_stages()[i])) continue;
    settings.stages.push_back({static_cast<int>(i), {}});
    parse_values(stage, 1, gradient_stages()[i].fields, settings.stages.back().values);
    return;
  }
  type_problem("has no stage " + py::repr(stage).cast<std::string>());
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

std::vector<std::pair<std::string, std::vector<std::string>>> stage_names() {
  std::vector<std::pair<std::string, std::vector<std::string>>> names;
  for (const StageInfo& stage : gradient_stages()) names.emplace_back(stage.name, names_of(stage.fields));
  for (const DecayInfo& decay : decays()) names.emplace_back(decay.stage.name, names_of(decay.stage.fields));
  return names;
}

const RuleInfo& parse(py::handle kernel, cpu::Settings& settings) {
  if (!PyTuple_Check(kernel.ptr()) || PyTuple_GET_SIZE(kernel.ptr()) != 3) {
    type_problem("takes (rule, values, stages), got " + py::repr(kernel).cast<std::string>());
  }
  const auto& rule = py::cast<const RuleInfo&>(py::handle(PyTuple_GET_ITEM(kernel.ptr(), 0)));
  settings.rule = rule.index;
  parse_values(PyTuple_GET_ITEM(kernel.ptr(), 1), 0, rule.fields, settings.values);
  settings.stages.clear();
  settings.decay = Decay::kNone;
  PyObject* stages = PyTuple_GET_ITEM(kernel.ptr(), 2);
  if (!PyTuple_Check(stages) || PyTuple_GET_SIZE(stages) >= Pipeline::kMaxOperations) {
    type_problem("takes a tuple of stages, got " + py::repr(stages).cast<std::string>());
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(stages); ++i) parse_stage(PyTuple_GET_ITEM(stages, i), settings);
  return rule;
}

}  // namespace gradstep::python
