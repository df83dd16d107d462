// Looking up states, parameter by parameter, without hashing keys.
#pragma once

#include <pybind11/pybind11.h>

#include <unordered_map>

#include "array.h"

namespace gradstep::python {

// Finds the values of keys in a dict. Almost always keys are asked for in the dict's own order, and then none has to be hashed:
// torch's tensors hash in Python, at five times the price of all the rest.
class StateWalk {
 public:
  StateWalk(PyObject* state, Holds& holds) : state_(state), holds_(holds) {}

  // The value of `key`, held; null if there is none.
  PyObject* find(PyObject* key) {
    PyObject *at = nullptr, *value = nullptr;
    if (by_key_.empty()) {
      Py_ssize_t position = position_;
      if (PyDict_Next(state_, &position, &at, &value) && at == key) {
        position_ = position;
        holds_.object(value);
        return value;
      }
      for (position = 0; PyDict_Next(state_, &position, &at, &value);) {
        holds_.object(at);
        holds_.object(value);
        by_key_.emplace(at, value);
      }
    }
    const auto found = by_key_.find(key);
    value = found != by_key_.end() ? found->second : PyDict_GetItemWithError(state_, key);
    if (value) holds_.object(value);
    else if (PyErr_Occurred()) throw pybind11::error_already_set();
    return value;
  }

 private:
  PyObject* state_;
  Holds& holds_;
  Py_ssize_t position_ = 0;
  std::unordered_map<PyObject*, PyObject*> by_key_;
};

}  // namespace gradstep::python
