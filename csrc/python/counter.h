// Numbers that stand beside a parameter's states: how many steps it has taken, how many averages, the norm of its gradients.
#pragma once

#include <pybind11/pybind11.h>

#include "../core/engine.h"
#include "entry.h"

namespace gradstep::python {

// An array of one number that a device keeps: float32, float64 or int64. Throws Problem for anything else.
DeviceNumber device_number(const View& view, PyObject* object, bool writes = false);

// A number in a state dict: a Python number, or an array of one number (float32, float64, int64), which is changed in place.
// What stands on a device is neither read nor written here.
class Number {
 public:
  // Whether there is a number at all.
  explicit operator bool() const { return dict_ != nullptr; }

  // Whether it stands in an array, where it can be changed without a dict.
  bool is_array() const { return data_ != nullptr; }

  // The bytes of that array.
  Entry::Span span() const { return {data_, data_ + bits_ / 8}; }

  // Where it is; of a device, also what the device needs to know, and the stream that the array's owner works on.
  int device() const { return device_; }
  DeviceNumber on_device() const { return on_device_; }
  std::int64_t stream() const { return stream_; }

 protected:
  // Takes `object`, the item `name` of `dict`. Throws Problem if it is no number. Returns 0 for one on a device.
  double take(PyObject* dict, PyObject* name, PyObject* object, Holds& holds);
  void set(double value, bool whole) const;

  char kind_ = 0;
  int bits_ = 0;
  std::byte* data_ = nullptr;  // null: a Python number
  int device_ = kHost;

 private:
  DeviceNumber on_device_;
  std::int64_t stream_ = 0;
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
