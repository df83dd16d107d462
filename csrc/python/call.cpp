// One step as a function of arrays: the functions' way into a plan.
#include <algorithm>

#include "plan.h"

namespace gradstep::python {
namespace py = pybind11;

py::object Plan::update(const char* function, const py::handle& kernel, const py::object& params, const py::object& grads,
                        const py::tuple& states, const py::object& step, const py::object& conditions) {
  thread_local Plan shared({}, Face::kArray, false);
  if (!shared.busy_) return shared.step_arrays(function, kernel, params, grads, states, step, conditions);
  // Reading an operand has run Python code, and that comes here.
  return Plan({}, Face::kArray, false).step_arrays(function, kernel, params, grads, states, step, conditions);
}

py::object Plan::step_arrays(const char* function, const py::handle& kernel, const py::object& params, const py::object& grads,
                             const py::tuple& states, const py::object& step, const py::object& given_conditions) {
  const Scope scope(*this);
  labels_.function = function;
  const Conditions conditions = parse_conditions(given_conditions);
  add_group(kernel, conditions.options);
  const RuleInfo& rule = *groups_.back().rule;
  if (groups_.back().roles.extras != 0 || groups_.back().roles.has_rest()) {
    raise(PyExc_TypeError, labels_.function + ": takes no stage that keeps arrays of its own");
  }
  // A norm that is kept comes after the states.
  const bool norm = groups_.back().settings.adaptation == Adaptation::kNovograd;
  const int n = 2 + static_cast<int>(rule.states.size()), at_step = n + norm;
  if (static_cast<int>(states.size()) != at_step - 2) {
    raise(PyExc_TypeError,
          labels_.function + ": takes " + std::to_string(at_step - 2) + " states, got " + std::to_string(states.size()));
  }

  PyObject* given[kMaxViews + 2] = {params.ptr(), grads.ptr()};
  for (int k = 2; k < at_step; ++k) given[k] = PyTuple_GET_ITEM(states.ptr(), k - 2);
  given[at_step] = step.ptr();

  const auto add = [&](std::size_t index, PyObject* const* operands, PyObject* number, PyObject* norm_state) {
    items_.push_back({index, 0, nullptr, {}, groups_.back().roles});
    Item& item = items_.back();
    std::copy_n(operands, n, item.operands);
    try {
      item.moment.step = step_argument(number);
    } catch (Problem& problem) {
      refuse(item, kStepCount, problem);
    }
    item.moment.first = rule.has_first && item.moment.step == 1;
    item.moment.position = static_cast<std::int64_t>(index);
    item.norm = norm_state;
    take(item);
  };

  // The norms that a function is given may lie anywhere; they are no operands of a sweep.
  const auto check_norms = [&] {
    for (const Item& item : items_) {
      if (!item.norm) continue;
      const Entry::Span norm = item.norm_state.span();
      const auto clashes = [&](const Entry::Span& span) { return norm.begin < span.end && span.begin < norm.end; };
      for (const Item& other : items_) {
        if (&other != &item && clashes(other.norm_state.span())) {
          refuse(item, kNormState, {PyExc_ValueError, "shares memory with " + label(other, kNormState)});
        }
        const Entry& entry = entries_[other.index];
        for (int k = 0; k < entry.roles().n_views(); ++k) {
          if (clashes(entry.span(k))) {
            refuse(item, kNormState, {PyExc_ValueError, "shares memory with " + label(other, operand_of(other, k))});
          }
        }
      }
    }
  };

  const auto finish = [&]() -> py::object {
    check_norms();
    const Outcome outcome = run(conditions, {false, conditions.options.checks, false}).outcome;
    if (outcome.skipped() && conditions.raises) refuse_nonfinite(outcome);
    for (const Item& item : items_) {
      if (item.norm && !outcome.skipped()) item.norm_state.write(item.norm_squared);
    }
    if (!conditions.options.checks) return py::none();
    return py::bool_(!outcome.skipped());
  };

  labels_.face = is_array(params.ptr()) ? Face::kArray : Face::kArrays;
  if (labels_.face == Face::kArray) {
    add(0, given, given[at_step], norm ? given[n] : nullptr);
    return finish();
  }

  // Sequences: all of one length; a single step number serves all.
  PyObject* lists[kMaxViews + 2] = {};
  const bool one_step = step.is_none() || (PyIndex_Check(step.ptr()) && !PySequence_Check(step.ptr()));
  const Item names{0, 0, nullptr, {}, groups_.back().roles};
  for (int k = 0; k < (one_step ? at_step : at_step + 1); ++k) {
    const int operand = k == at_step ? int{kStepCount} : k == n ? int{kNormState} : k;
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
                                  (k >= n ? " numbers" : " arrays") + ", params has " +
                                  std::to_string(PyTuple_GET_SIZE(lists[0])));
    }
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(lists[0]); ++i) {
    PyObject* operands[kMaxViews] = {};
    for (int k = 0; k < n; ++k) operands[k] = PyTuple_GET_ITEM(lists[k], i);
    add(static_cast<std::size_t>(i), operands, one_step ? step.ptr() : PyTuple_GET_ITEM(lists[at_step], i),
        norm ? PyTuple_GET_ITEM(lists[n], i) : nullptr);
  }
  return finish();
}

}  // namespace gradstep::python
