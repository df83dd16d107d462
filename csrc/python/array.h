// Reading arrays: where an array-like Python object keeps its numbers, in what type and layout.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../core/sweep.h"

namespace gradstep::python {

// What is wrong with an argument; the caller knows its name and puts it in front.
struct Problem {
  PyObject* type;  // the Python exception
  std::string text;
};

// Raises a Python exception.
[[noreturn]] inline void raise(PyObject* type, const std::string& text) {
  PyErr_SetString(type, text.c_str());
  throw pybind11::error_already_set();
}

[[noreturn]] inline void type_problem(std::string text) { throw Problem{PyExc_TypeError, std::move(text)}; }
[[noreturn]] inline void value_problem(std::string text) { throw Problem{PyExc_ValueError, std::move(text)}; }

// Where memory is: the number of a CUDA device, or this. Pinned memory is the CPU's.
inline constexpr int kHost = -1;

// An array as it stands in memory. A complex array is read as its real and imaginary parts, a last dimension of two: that is
// how torch's optimizers treat it (torch.view_as_real).
struct View {
  std::byte* data;
  char kind;  // of the dtype, as in NumPy: 'f', 'c', 'i', 'u'; 'b' for bfloat16; 0 for anything else
  int bits;   // of one real number
  bool native;
  bool writable;
  bool is_part = false;      // the memory of this process, of a tensor that lies in several (torch's DTensor)
  int device = kHost;
  std::int64_t stream = 0;   // that its owner works on, as __cuda_array_interface__ numbers it; 0: it does not say
  int ndim;
  std::int64_t shape[kMaxDims + 1];
  std::int64_t strides[kMaxDims + 1];  // bytes

  std::int64_t size() const;
  std::int64_t item() const { return bits / 8; }
  // Whether it holds numbers that a step can compute with, and in which format.
  bool is_float() const {
    return kind == 'b' || (kind == 'f' && bits == 16) || ((kind == 'f' || kind == 'c') && (bits == 32 || bits == 64));
  }
  bool is_half() const { return is_float() && bits == 16; }
  Format format() const {
    if (kind == 'b') return Format::kBFloat16;
    return bits == 16 ? Format::kFloat16 : bits == 32 ? Format::kFloat32 : Format::kFloat64;
  }
  bool holds_codes() const { return kind == 'u' && bits == 8; }  // of a format in blocks
};

// Keeps what has been read alive, and its memory in place, until it is destroyed or cleared. The GIL must be held for either.
class Holds {
 public:
  Holds() = default;
  ~Holds() { clear(); }
  Holds(const Holds&) = delete;
  Holds& operator=(const Holds&) = delete;

  void object(PyObject* object) {
    Py_INCREF(object);
    objects_.push_back(object);
  }
  void take(PyObject* object) { objects_.push_back(object); }  // a reference that the caller owns
  void buffer(Py_buffer* buffer) { buffers_.push_back(buffer); }
  void reserve(std::size_t n) { objects_.reserve(n); }
  void clear();

 private:
  std::vector<PyObject*> objects_;
  std::vector<Py_buffer*> buffers_;
};

// Asks for the memory that `read` will look at first. A tensor is a Python object, an object of torch and one of its storage,
// each on a memory page of its own; with thousands of tensors, waiting for one page after the other takes most of a step.
void prefetch_array(PyObject* object);

// Whether `object` is an array of a kind that `read` knows.
bool is_array(PyObject* object);

// Reads NumPy arrays, tensors (torch's C table for DLPack where the type has one, their Python methods otherwise; of a DTensor
// this process's part), objects with the buffer protocol, `__cuda_array_interface__` or `__dlpack__`, in this order. Throws
// Problem where it can't. The caller holds `object` itself: reading one may run Python code that lets go of another.
void read(PyObject* object, View& view, Holds& holds);

// Reads an array that has to be in CPU memory; `function` is for the message.
void read_host(PyObject* object, View& view, Holds& holds, const std::string& function);

// Whether `object` is a torch tensor, whose version counter has to be told of a change.
bool is_tensor(PyObject* object);

// Tells torch that tensors were changed in place, so that autograd refuses to use saved values that are gone.
void bump_versions(const pybind11::list& tensors);

// "float32" or "int64": the dtype as its owner spells it, for messages.
std::string dtype_name(PyObject* object);

// "on cuda:1" or "in CPU memory".
std::string place_text(int device);

// "(3, 4)", as Python prints a tuple. `complex`: without the last dimension, the one of the parts.
std::string tuple_text(int ndim, const std::int64_t* values, bool complex = false);

// Reads tensors through their Python methods even where the type has a C table, as with an older torch. For tests.
void set_use_exchange_api(bool use);

// Reads arrays in CPU memory as being on a device; kHost: as what they are. For tests.
void set_pretend_device(int device);

}  // namespace gradstep::python
