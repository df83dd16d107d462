#include "array.h"

#include <pybind11/numpy.h>

#include <cstring>

#include "dlpack.h"

namespace gradstep::python {
namespace py = pybind11;
namespace {

bool use_exchange_api = true;

// ---- kinds of objects -----------------------------------------------------------------------------------------------------

// How objects of one Python type are read.
struct Reader {
  PyTypeObject* type = nullptr;
  bool tensor = false;  // has torch's methods
  const dlpack::ExchangeApi* api = nullptr;
};

const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  const dlpack::ExchangeApi* api = nullptr;
  if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
    api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    while (api && api->version.major != 1) api = api->previous;
    if (api && !api->tensor_from_py_object) api = nullptr;
  }
  PyErr_Clear();
  Py_XDECREF(capsule);
  return api;
}

Reader make_reader(PyTypeObject* type) {
  Py_INCREF(type);  // kept for good: there are a few such types in a process
  Reader reader{type};
  auto* object = reinterpret_cast<PyObject*>(type);
  reader.tensor = PyObject_HasAttrString(object, "data_ptr") && PyObject_HasAttrString(object, "is_conj") &&
                  PyObject_HasAttrString(object, "stride");
  reader.api = exchange_api(type);
  return reader;
}

Reader reader_of(PyObject* object) {
#if defined(Py_GIL_DISABLED)
  thread_local std::vector<Reader> readers;
#else
  static std::vector<Reader> readers;
#endif
  PyTypeObject* type = Py_TYPE(object);
  for (const Reader& reader : readers) {
    if (reader.type == type) return reader;
  }
  return readers.emplace_back(make_reader(type));
}

// ---- one reader a kind ----------------------------------------------------------------------------------------------------

void too_many_dimensions(int ndim) {
  value_problem("has " + std::to_string(ndim) + " dimensions, at most " + std::to_string(kMaxDims) + " are supported");
}

// Turns the dimension-less parts of a complex number into a last dimension.
void split_complex(View& view) {
  if (view.kind != 'c') return;
  view.shape[view.ndim] = 2;
  view.strides[view.ndim] = view.bits / 8;
  ++view.ndim;
}

// NumPy itself has no bfloat16: it is a dtype of another package, known by its name.
char kind_of(const py::dtype& dtype) {
  static int brain = -1;  // the number of that dtype, once it has been seen
  const char kind = dtype.kind();
  if (kind == 'b') return '\0';
  if (kind != 'V' || dtype.itemsize() != 2) return kind;
  if (dtype.num() != brain && py::str(dtype.attr("name")).cast<std::string>() == "bfloat16") brain = dtype.num();
  return dtype.num() == brain ? 'b' : '\0';
}

void read_numpy(PyObject* object, View& view) {
  const auto array = py::reinterpret_borrow<py::array>(object);
  const py::dtype dtype = array.dtype();
  if (array.ndim() > kMaxDims) too_many_dimensions(static_cast<int>(array.ndim()));
  view.data = const_cast<std::byte*>(static_cast<const std::byte*>(array.data()));
  view.kind = kind_of(dtype);
  view.bits = static_cast<int>(dtype.itemsize()) * 8 / (view.kind == 'c' ? 2 : 1);
  view.native = dtype.byteorder() == '=' || dtype.byteorder() == '|';
  view.writable = array.writeable();
  view.ndim = static_cast<int>(array.ndim());
  std::copy_n(array.shape(), view.ndim, view.shape);
  std::copy_n(array.strides(), view.ndim, view.strides);
}

void read_dltensor(const dlpack::Tensor& tensor, View& view) {
  if (tensor.device.type != dlpack::kCpu && tensor.device.type != dlpack::kCudaHost) {
    value_problem("is not in CPU memory (DLPack device type " + std::to_string(tensor.device.type) +
                  "): this build updates arrays in CPU memory only");
  }
  if (tensor.ndim > kMaxDims) too_many_dimensions(tensor.ndim);
  const bool complex = tensor.dtype.code == dlpack::kComplex;
  view.data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  static constexpr std::pair<std::uint8_t, char> kKinds[] = {
      {dlpack::kFloat, 'f'}, {dlpack::kBFloat, 'b'}, {dlpack::kComplex, 'c'}, {dlpack::kInt, 'i'}, {dlpack::kUnsigned, 'u'}};
  view.kind = '\0';
  for (const auto& [code, kind] : kKinds) {
    if (tensor.dtype.code == code && tensor.dtype.lanes == 1) view.kind = kind;
  }
  view.bits = tensor.dtype.bits / (complex ? 2 : 1);
  view.native = view.writable = true;
  view.ndim = tensor.ndim;
  const std::int64_t item = tensor.dtype.bits / 8;
  std::int64_t compact = item;
  for (int d = tensor.ndim; d-- > 0;) {
    view.shape[d] = tensor.shape[d];
    view.strides[d] = tensor.strides ? tensor.strides[d] * item : compact;
    compact *= tensor.shape[d];
  }
}

py::object call(PyObject* object, const char* method) { return py::reinterpret_borrow<py::object>(object).attr(method)(); }

// Conjugation and negation that torch has put off: the memory holds other numbers than the tensor. They come from views of
// complex tensors, whose parts do not lie side by side, so other tensors need not be asked (nor numbers: torch computes those).
void refuse_lazy(PyObject* object, const View& view) {
  const std::int64_t item = view.bits / 8;
  if (view.kind != 'c' && (view.ndim == 0 || view.strides[view.ndim - 1] == item)) return;
  if (call(object, "is_conj").cast<bool>() || call(object, "is_neg").cast<bool>()) {
    value_problem("is a conjugated or negated view of other memory: call resolve_conj() or resolve_neg() on it first");
  }
}

void read_exchange_api(const Reader& reader, PyObject* object, View& view) {
  dlpack::Tensor tensor;
  if (reader.api->tensor_from_py_object(object, &tensor) != 0) {
    PyErr_Clear();
    value_problem("has no strided memory of its own (sparse, meta or wrapper tensor)");
  }
  read_dltensor(tensor, view);
  if (reader.tensor) refuse_lazy(object, view);
}

// As torch before its C table has to be read.
void read_tensor_methods(PyObject* object, View& view) {
  const auto tensor = py::reinterpret_borrow<py::object>(object);
  try {
    if (tensor.attr("device").attr("type").cast<std::string>() != "cpu") {
      value_problem("is on device " + py::str(tensor.attr("device")).cast<std::string>() +
                    ": this build updates arrays in CPU memory only");
    }
    const auto shape = py::tuple(tensor.attr("shape")), strides = py::tuple(tensor.attr("stride")());
    if (shape.size() > kMaxDims) too_many_dimensions(static_cast<int>(shape.size()));
    const auto item = tensor.attr("element_size")().cast<std::int64_t>();
    const bool complex = tensor.attr("is_complex")().cast<bool>();
    const std::string dtype = dtype_name(object);
    view.data = reinterpret_cast<std::byte*>(tensor.attr("data_ptr")().cast<std::uintptr_t>());
    static constexpr std::pair<const char*, char> kKinds[] = {
        {"float", 'f'}, {"bfloat16", 'b'}, {"complex", 'c'}, {"int", 'i'}, {"uint", 'u'}};
    view.kind = '\0';
    for (const auto& [name, kind] : kKinds) {
      if (dtype.starts_with(name)) view.kind = kind;
    }
    view.bits = static_cast<int>(item) * 8 / (complex ? 2 : 1);
    view.native = view.writable = true;
    view.ndim = static_cast<int>(shape.size());
    for (int d = 0; d < view.ndim; ++d) {
      view.shape[d] = shape[d].cast<std::int64_t>();
      view.strides[d] = strides[d].cast<std::int64_t>() * item;
    }
  } catch (py::error_already_set&) {
    value_problem("has no strided memory of its own (sparse, meta or wrapper tensor)");
  }
  refuse_lazy(object, view);
}

void read_buffer(PyObject* object, View& view, Holds& holds) {
  auto* buffer = new Py_buffer;
  bool writable = true;
  if (PyObject_GetBuffer(object, buffer, PyBUF_RECORDS) != 0) {
    PyErr_Clear();
    writable = false;
    if (PyObject_GetBuffer(object, buffer, PyBUF_RECORDS_RO) != 0) {
      delete buffer;
      throw py::error_already_set();
    }
  }
  holds.buffer(buffer);
  if (buffer->ndim > kMaxDims) too_many_dimensions(buffer->ndim);
  const char* format = buffer->format ? buffer->format : "B";
  view.native = *format != '>' && *format != '!';
  if (*format && std::strchr("@=<>!", *format)) ++format;
  const bool complex = *format == 'Z';
  if (complex) ++format;
  const char* known = *format && format[1] == '\0' ? std::strchr("efdhB", *format) : nullptr;
  view.kind = !known ? '\0' : *known == 'B' ? 'u' : *known == 'h' ? 'i' : complex ? 'c' : 'f';
  view.bits = static_cast<int>(buffer->itemsize) * 8 / (complex ? 2 : 1);
  view.data = static_cast<std::byte*>(buffer->buf);
  view.writable = writable;
  view.ndim = buffer->ndim;
  std::copy_n(buffer->shape, view.ndim, view.shape);
  std::copy_n(buffer->strides, view.ndim, view.strides);
}

// Only DLPack 1.0 tells whether memory may be written; what comes by an older capsule counts as read-only, as in NumPy.
void read_dlpack(PyObject* object, View& view, Holds& holds) {
  const auto method = py::reinterpret_borrow<py::object>(object).attr("__dlpack__");
  py::object capsule;
  try {
    capsule = method(py::arg("max_version") = py::make_tuple(1, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    capsule = method();
  }
  holds.object(capsule.ptr());  // an unused capsule frees its tensor when it goes
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    auto* managed = static_cast<dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    read_dltensor(managed->tensor, view);
    view.writable = !(managed->flags & dlpack::kReadOnly);
  } else {
    auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (!managed) throw py::error_already_set();
    read_dltensor(managed->tensor, view);
    view.writable = false;
  }
}

}  // namespace

std::int64_t View::size() const {
  std::int64_t size = 1;
  for (int d = 0; d < ndim; ++d) size *= shape[d];
  return size;
}

void Holds::clear() {
  for (PyObject* object : objects_) Py_DECREF(object);
  objects_.clear();
  for (Py_buffer* buffer : buffers_) {
    PyBuffer_Release(buffer);
    delete buffer;
  }
  buffers_.clear();
}

void prefetch_array(PyObject* object) {
  // Behind the header of a tensor's Python object stands a pointer to torch's. Where it does not, the hint is wasted.
  void* behind_header[2] = {};
  if (Py_TYPE(object)->tp_basicsize >= static_cast<Py_ssize_t>(sizeof(PyObject) + sizeof behind_header)) {
    std::memcpy(behind_header, reinterpret_cast<const std::byte*>(object) + sizeof(PyObject), sizeof behind_header);
  }
  for (void* at : behind_header) prefetch<256>(at);
}

bool is_array(PyObject* object) {
  if (py::isinstance<py::array>(object)) return true;
  if (PyList_CheckExact(object) || PyTuple_CheckExact(object)) return false;
  const Reader reader = reader_of(object);
  return reader.api || reader.tensor || PyObject_CheckBuffer(object) || PyObject_HasAttrString(object, "__dlpack__");
}

bool is_tensor(PyObject* object) { return !py::isinstance<py::array>(object) && reader_of(object).tensor; }

void read(PyObject* object, View& view, Holds& holds) {
  if (py::isinstance<py::array>(object)) {
    read_numpy(object, view);
  } else if (const Reader reader = reader_of(object); reader.api && use_exchange_api) {
    read_exchange_api(reader, object, view);
  } else if (reader.tensor) {
    read_tensor_methods(object, view);
  } else if (PyObject_CheckBuffer(object)) {
    read_buffer(object, view, holds);
  } else if (PyObject_HasAttrString(object, "__dlpack__")) {
    read_dlpack(object, view, holds);
  } else {
    type_problem(std::string("must be an array, got ") + Py_TYPE(object)->tp_name);
  }
  split_complex(view);
}

void bump_versions(const py::list& tensors) {
  static const auto increment = py::object(py::module_::import("torch.autograd.graph").attr("increment_version")).release();
  try {
    increment(tensors);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError) && !error.matches(PyExc_AttributeError)) throw;
    for (const py::handle tensor : tensors) increment(tensor);  // torch before 2.6 takes one tensor at a time
  }
}

std::string dtype_name(PyObject* object) {
  PyObject* dtype = PyObject_GetAttrString(object, "dtype");
  PyErr_Clear();
  if (!dtype) return "that gradstep does not know";
  const auto text = py::str(py::reinterpret_steal<py::object>(dtype)).cast<std::string>();
  return text.starts_with("torch.") ? text.substr(6) : text;
}

std::string tuple_text(int ndim, const std::int64_t* values, bool complex) {
  if (complex) --ndim;
  std::string text = "(";
  for (int d = 0; d < ndim; ++d) text += (d ? ", " : "") + std::to_string(values[d]);
  return text + (ndim == 1 ? ",)" : ")");
}

void set_use_exchange_api(bool use) { use_exchange_api = use; }

}  // namespace gradstep::python
