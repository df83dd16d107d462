// Settings as Python gives them: which rule, with which numbers, behind which stages. All checked here.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../core/settings.h"

namespace gradstep::python {

// A rule of the registry, as Python sees it.
struct RuleInfo {
  int index;
  std::string name;
  std::vector<Field> fields;
  std::vector<PyObject*> states;  // interned names
  std::vector<PyObject*> scales;  // the names of their scales, where they are stored in blocks
  std::uint32_t unsigned_states;  // a bit each
  bool has_first;

  std::vector<std::string> field_names() const;
  std::vector<std::string> state_names() const;
};

// In the order of the registry.
const std::vector<RuleInfo>& rules();

// The names of states that are never negative.
std::vector<std::string> unsigned_states();

// The stages that `parse` knows, each with the names of its values.
std::vector<std::pair<std::string, std::vector<std::string>>> stage_names();

// Fills `settings` from a tuple (rule, values, stages): `values` are the rule's in the order of its fields, `stages` is a tuple
// of tuples (name, value, ...). A learning rate that stands on a device is left there: `device_lr`, borrowed, and null for any
// other. Throws Problem.
const RuleInfo& parse(pybind11::handle kernel, Settings& settings, PyObject*& device_lr);

}  // namespace gradstep::python
