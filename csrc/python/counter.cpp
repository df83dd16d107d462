#include "counter.h"

#include <cmath>

namespace gradstep::python {
namespace py = pybind11;
namespace {

// Up to here every integer is a double.
constexpr double kMaxStep = 9007199254740992.0;

// Calls function(pointer to the number), of the type that it has.
template <class Function>
void with_number(char kind, int bits, std::byte* data, Function function) {
  if (kind == 'f' && bits == 32) function(reinterpret_cast<float*>(data));
  else if (kind == 'f' && bits == 64) function(reinterpret_cast<double*>(data));
  else if (kind == 'i' && bits == 64) function(reinterpret_cast<std::int64_t*>(data));
  else type_problem("must be an int, or a float32, float64 or int64 array");
}

void check_one(const View& view, PyObject* object, bool writes) {
  if (view.size() != 1 || !view.data)
    value_problem("has shape " + tuple_text(view.ndim, view.shape) + ", must hold one number");
  if (writes && !view.writable) value_problem("is read-only");
  if (!view.native) type_problem("has dtype " + dtype_name(object) + ", must be in native byte order");
  if (reinterpret_cast<std::uintptr_t>(view.data) % static_cast<std::uintptr_t>(view.bits / 8) != 0)
    value_problem("is misaligned");
}

}  // namespace

DeviceNumber device_number(const View& view, PyObject* object, bool writes) {
  check_one(view, object, writes);
  DeviceNumber number;
  with_number(view.kind, view.bits, view.data, [&](auto* at) {
    using T = std::remove_pointer_t<decltype(at)>;
    number = {view.data, std::is_same_v<T, float>    ? DeviceNumber::Kind::kFloat32
                         : std::is_same_v<T, double> ? DeviceNumber::Kind::kFloat64
                                                     : DeviceNumber::Kind::kInt64};
  });
  return number;
}

double Number::take(PyObject* dict, PyObject* name, PyObject* object, Holds& holds) {
  double value = 0;
  if (PyLong_Check(object) || PyFloat_Check(object)) {
    value = PyFloat_AsDouble(object);
    if (PyErr_Occurred()) throw py::error_already_set();
  } else {
    View view;
    python::read(object, view, holds);
    if (view.device != kHost) {
      on_device_ = device_number(view, object, true);
      device_ = view.device;
      stream_ = view.stream;
    } else {
      check_one(view, object, true);
      with_number(view.kind, view.bits, view.data, [&](auto* at) { value = static_cast<double>(*at); });
    }
    kind_ = view.kind;
    bits_ = view.bits;
    data_ = view.data;
  }
  dict_ = dict;
  name_ = name;
  return value;
}

void Number::set(double value, bool whole) const {
  if (device_ != kHost) return;
  if (data_) {
    with_number(kind_, bits_, data_, [&](auto* at) { *at = static_cast<std::remove_pointer_t<decltype(at)>>(value); });
    return;
  }
  const py::object object = whole ? py::object(py::int_(static_cast<std::int64_t>(value))) : py::object(py::float_(value));
  if (PyDict_SetItem(dict_, name_, object.ptr()) != 0) throw py::error_already_set();
}

double Counter::read(PyObject* dict, PyObject* name, PyObject* object, Holds& holds) {
  const double count = take(dict, name, object, holds);
  if (device_ != kHost) return count;
  if (data_ && count < kMaxStep) {
    with_number(kind_, bits_, data_, [&](auto* at) {
      using T = std::remove_pointer_t<decltype(at)>;
      if (static_cast<double>(static_cast<T>(count + 1)) != count + 1) {
        value_problem("stands at " + std::to_string(static_cast<std::int64_t>(count)) + ", beyond which its dtype " +
                      dtype_name(object) + " cannot count");
      }
    });
  }
  if (!(count >= 0 && count < kMaxStep && count == std::floor(count))) {
    value_problem("must be a whole number from 0 to 2^53 - 1, got " + py::repr(object).cast<std::string>());
  }
  return count;
}

double Scalar::read(PyObject* dict, PyObject* name, PyObject* object, Holds& holds) {
  const double value = take(dict, name, object, holds);
  if (kind_ == 'i') type_problem("must be a float, or a float32 or float64 array");
  if (value < 0) value_problem("must be >= 0, got " + py::repr(object).cast<std::string>());
  return value;
}

double step_argument(PyObject* step) {
  if (step == Py_None) return 2;
  if (!PyIndex_Check(step) || PyBool_Check(step)) type_problem("must be an int, got " + py::repr(step).cast<std::string>());
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(step));
  int overflow = 0;
  const long long count = number ? PyLong_AsLongLongAndOverflow(number.ptr(), &overflow) : 0;
  if (PyErr_Occurred()) throw py::error_already_set();
  if (overflow != 0 || count < 1 || count > static_cast<long long>(kMaxStep)) {
    value_problem("must be from 1 to 2^53, got " + py::repr(step).cast<std::string>());
  }
  return static_cast<double>(count);
}

}  // namespace gradstep::python
