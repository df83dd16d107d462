#include "array.h"

#include <pybind11/numpy.h>

#include <cstring>

#include "device.h"
#include "dlpack.h"

namespace gradstep::python {
namespace py = pybind11;
namespace {

bool use_exchange_api = true;
int pretend_device = kHost;

// ---- kinds of objects -----------------------------------------------------------------------------------------------------

// How objects of one Python type are read.
struct Reader {
  PyTypeObject* type = nullptr;
  bool tensor = false;  // has torch's methods
  bool parted = false;  // torch's DTensor
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
  reader.parted = reader.tensor && PyObject_HasAttrString(object, "to_local") && PyObject_HasAttrString(object, "placements");
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

// Of what is on no device that there is an engine for.
constexpr const char* kNeither = ": gradstep updates arrays in CPU memory and on CUDA devices";

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
  if (tensor.device.type == dlpack::kCuda || tensor.device.type == dlpack::kCudaManaged) {
    view.device = tensor.device.id;
  } else if (tensor.device.type != dlpack::kCpu && tensor.device.type != dlpack::kCudaHost) {
    value_problem("is on a device of DLPack's type " + std::to_string(tensor.device.type) + kNeither);
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
    const py::object device = tensor.attr("device");
    const auto type = device.attr("type").cast<std::string>();
    if (type == "cuda") view.device = device.attr("index").cast<int>();
    else if (type != "cpu") value_problem("is on device " + py::str(device).cast<std::string>() + kNeither);
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

// The tensor that holds this process's part of a DTensor. Its method `to_local` would record the view for autograd.
PyObject* part_of(PyObject* object, Holds& holds) {
  PyObject* part = PyObject_GetAttrString(object, "_local_tensor");
  if (!part) {
    PyErr_Clear();
    part = call(object, "to_local").release().ptr();
  }
  if (PyObject_HasAttrString(part, "wait")) {  // what a collective operation has not filled yet
    py::object arrived = call(part, "wait");
    Py_DECREF(part);
    part = arrived.release().ptr();
  }
  holds.take(part);
  return part;
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

// The number of the CUDA device that an array says it is on, in one of the ways that libraries have; kHost if it does not.
int device_by_attributes(const py::object& object) {
  const auto is_cuda = [](std::int32_t type) { return type == dlpack::kCuda || type == dlpack::kCudaManaged; };
  try {
    if (py::hasattr(object, "__dlpack_device__")) {
      const auto [type, id] = object.attr("__dlpack_device__")().cast<std::pair<std::int32_t, int>>();
      return is_cuda(type) ? id : kHost;
    }
    if (const py::object device = py::getattr(object, "device", py::none()); py::hasattr(device, "id")) {
      return device.attr("id").cast<int>();
    }
  } catch (py::error_already_set&) {
  } catch (py::cast_error&) {
  }
  return kHost;
}

// The CUDA array interface, versions 2 and 3 (numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html). It has no place
// for the device.
void read_cuda_interface(PyObject* object, View& view) {
  const auto owner = py::reinterpret_borrow<py::object>(object);
  const py::object given_interface = owner.attr("__cuda_array_interface__");
  try {
    const auto interface = py::dict(given_interface);
    const auto get = [&](const char* key) { return interface.contains(key) ? py::object(interface[key]) : py::none(); };
    if (const int version = get("version").cast<int>(); version < 2) {
      value_problem("has version " + std::to_string(version) + " of __cuda_array_interface__, versions from 2 on can be read");
    }
    if (!get("mask").is_none()) value_problem("has a mask");
    const auto shape = py::tuple(get("shape"));
    if (shape.size() > kMaxDims) too_many_dimensions(static_cast<int>(shape.size()));
    const auto dtype = get("typestr").cast<std::string>();
    const auto [address, read_only] = get("data").cast<std::pair<std::uintptr_t, bool>>();
    const int item = dtype.size() > 2 ? std::stoi(dtype.substr(2)) : 0;
    const bool is_brain = dtype.substr(1) == "V2" && dtype_name(object) == "bfloat16";
    view.kind = is_brain ? 'b' : dtype.size() > 2 && std::strchr("fciu", dtype[1]) ? dtype[1] : '\0';
    view.bits = item * 8 / (view.kind == 'c' ? 2 : 1);
    view.native = dtype[0] != '>';
    view.writable = !read_only;
    view.data = reinterpret_cast<std::byte*>(address);
    view.ndim = static_cast<int>(shape.size());
    const py::object given = get("strides");
    const py::tuple strides = given.is_none() ? py::tuple() : py::tuple(given);
    if (!given.is_none() && strides.size() != shape.size()) throw py::value_error();
    std::int64_t compact = item;
    for (int d = view.ndim; d-- > 0;) {
      const auto at = static_cast<std::size_t>(d);
      view.shape[d] = shape[at].cast<std::int64_t>();
      view.strides[d] = given.is_none() ? compact : strides[at].cast<std::int64_t>();
      compact *= view.shape[d];
    }
    if (const py::object stream = get("stream"); !stream.is_none()) {
      view.stream = stream.cast<std::int64_t>();
      if (view.stream == 0) value_problem("has the stream 0 in its __cuda_array_interface__, which is neither 1 nor 2");
    }
  } catch (const std::exception&) {  // of Python, of a cast or of a number's text
    type_problem("has a __cuda_array_interface__ that makes no sense: " + py::repr(given_interface).cast<std::string>());
  }
  view.device = device_by_attributes(owner);
  if (view.device != kHost) return;
  try {
    view.device = device_at(view.data);
  } catch (const device::Error& error) {
    throw Problem{PyExc_RuntimeError, std::string("is on a CUDA device: ") + error.what()};
  }
}

// Only DLPack 1.0 tells whether memory may be written; what comes by an older capsule counts as read-only, as in NumPy.
void read_dlpack(PyObject* object, View& view, Holds& holds) {
  const auto owner = py::reinterpret_borrow<py::object>(object);
  const auto method = owner.attr("__dlpack__");
  // Steps order their streams themselves: the owner is not to wait for any.
  const bool on_device = device_by_attributes(owner) != kHost;
  py::object capsule;
  const auto try_call = [&](bool version, bool stream) {
    py::dict arguments;
    if (version) arguments["max_version"] = py::make_tuple(1, 0);
    if (stream) arguments["stream"] = -1;
    try {
      capsule = method(**arguments);
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError) || (!version && !stream)) throw;
    }
    return static_cast<bool>(capsule);
  };
  (on_device && (try_call(true, true) || try_call(false, true))) || try_call(true, false) || try_call(false, false);
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
  return reader.api || reader.tensor || PyObject_CheckBuffer(object) ||
         PyObject_HasAttrString(object, "__cuda_array_interface__") || PyObject_HasAttrString(object, "__dlpack__");
}

bool is_tensor(PyObject* object) { return !py::isinstance<py::array>(object) && reader_of(object).tensor; }

void read(PyObject* object, View& view, Holds& holds) {
  view.device = kHost;
  view.stream = 0;
  view.is_part = false;
  if (py::isinstance<py::array>(object)) {
    read_numpy(object, view);
  } else if (const Reader reader = reader_of(object); reader.parted) {
    read(part_of(object, holds), view, holds);
    view.is_part = true;
    return;
  } else if (reader.api && use_exchange_api) {
    read_exchange_api(reader, object, view);
  } else if (reader.tensor) {
    read_tensor_methods(object, view);
  } else if (PyObject_CheckBuffer(object)) {
    read_buffer(object, view, holds);
  } else if (PyObject_HasAttrString(object, "__cuda_array_interface__")) {
    read_cuda_interface(object, view);
  } else if (PyObject_HasAttrString(object, "__dlpack__")) {
    read_dlpack(object, view, holds);
  } else {
    type_problem(std::string("must be an array, got ") + Py_TYPE(object)->tp_name);
  }
  if (view.device == kHost) view.device = pretend_device;
  split_complex(view);
}

void read_host(PyObject* object, View& view, Holds& holds, const std::string& function) {
  read(object, view, holds);
  if (view.device != kHost) {
    value_problem("is " + place_text(view.device) + ": " + function + " takes arrays in CPU memory");
  }
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

std::string place_text(int device) { return device == kHost ? "in CPU memory" : "on cuda:" + std::to_string(device); }

std::string tuple_text(int ndim, const std::int64_t* values, bool complex) {
  if (complex) --ndim;
  std::string text = "(";
  for (int d = 0; d < ndim; ++d) text += (d ? ", " : "") + std::to_string(values[d]);
  return text + (ndim == 1 ? ",)" : ")");
}

void set_use_exchange_api(bool use) { use_exchange_api = use; }

void set_pretend_device(int device) { pretend_device = device; }

}  // namespace gradstep::python
