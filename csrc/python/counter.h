// Numbers that stand beside a parameter's states: how many steps it has taken, how many averages, the norm of its gradients.
#pragma once

#include <pybind11/pybind11.h>

#include "entry.h"

namespace gradstep::python {

// A number in a state dict: a Python number, or an array of one number (float32, float64, int64), which is changed in place.
class Number {
 public:
  // Whether there is a number at all.
  explicit operator bool() const { return dict_ != nullptr; }

  // Whether it stands in an array, where it can be changed without a dict.
  bool is_array() const { return data_ != nullptr; }

  // The bytes of that array.
  Entry::Span span() const { return {data_, data_ + bits_ / 8}; }

 protected:
  // Takes `object`, the item `name` of `dict`. Throws Problem if it is no number.
  double take(PyObject* dict, PyObject* name, PyObject* object, Holds& holds);
  void set(double value, bool whole) const;

  char kind_ = 0;
  int bits_ = 0;
  std::byte* data_ = nullptr;  // null: a Python number

 private:
  PyObject *dict_ = nullptr, *name_ = nullptr;
};

// A count. It is counted up by one.
class Counter : public Number {
 public:
  // Returns the count; throws Problem if it is none, or can't go further.
  double read(PyObject* dict, PyObject* name, PyObject* object, Holds& holds);
  void write(double count) const { set(count, true); }
};

// A number that is not negative; NaN goes through.
class Scalar : public Number {
 public:
  double read(PyObject* dict, PyObject* name, PyObject* object, Holds& holds);
  void write(double value) const { set(value, false); }
};

// The number of a step as a function's argument: an integer from 1 to 2^53. None is "not the first", and reads as 2.
double step_argument(PyObject* step);

}  // namespace gradstep::python
