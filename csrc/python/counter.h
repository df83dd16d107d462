// Step counts: how many steps a parameter has taken, as they stand in its state dict or come as an argument.
#pragma once

#include <pybind11/pybind11.h>

#include "array.h"

namespace gradstep::python {

// The count in a state dict: a Python number, or an array of one number (float32, float64, int64), which is counted up in
// place.
class Counter {
 public:
  // Whether there is a count at all.
  explicit operator bool() const { return dict_ != nullptr; }

  // Takes the count `object` of `dict` and returns it. Throws Problem if it is no count, or can't go further.
  double read(PyObject* dict, PyObject* object, Holds& holds);

  // Sets it.
  void write(double count) const;

 private:
  PyObject* dict_ = nullptr;
  char kind_ = 0;
  int bits_ = 0;
  std::byte* data_ = nullptr;  // null: a Python number
};

// "step", interned.
PyObject* step_name();

// The number of a step as a function's argument: an integer from 1 to 2^53. None is "not the first", and reads as 2.
double step_argument(PyObject* step);

}  // namespace gradstep::python
