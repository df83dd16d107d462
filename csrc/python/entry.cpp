#include "entry.h"

#include <pybind11/numpy.h>

#include <algorithm>

namespace gradstep::python {
namespace py = pybind11;
namespace {

void append(std::vector<std::int64_t>& seen, const View& view) {
  seen.push_back(static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(view.data)));
  seen.push_back(view.kind | view.bits << 8 | (view.native ? 1 << 24 : 0) | (view.writable ? 1 << 25 : 0) |
                 static_cast<std::int64_t>(view.device - kHost) << 32);
  seen.push_back(view.ndim);
  seen.insert(seen.end(), view.shape, view.shape + view.ndim);
  seen.insert(seen.end(), view.strides, view.strides + view.ndim);
}

bool is_c_contiguous(const View& view) {
  std::int64_t expected = view.bits / 8;
  for (int d = view.ndim; d-- > 0;) {
    if (view.shape[d] != 1 && view.strides[d] != expected) return false;
    expected *= view.shape[d];
  }
  return true;
}

void check_dtype(bool holds, PyObject* object, const std::string& must_be) {
  if (!holds) type_problem("has dtype " + dtype_name(object) + ", must be " + must_be);
}

// The dtype of operand `k`.
void check_type(int k, const Roles& roles, const View& view, const View& param, PyObject* object, PyObject* param_object) {
  if (roles.is_codes(k)) return check_dtype(view.holds_codes(), object, "uint8");
  if (roles.is_scale(k)) return check_dtype(view.kind == 'f' && view.bits == 32 && view.native, object, "float32");
  if (roles.has_rest() && k == roles.rest()) {
    switch (roles.precision) {
      case Precision::kSplit:
        return check_dtype(view.kind == 'i' && view.bits == 16 && view.native, object, "int16");
      case Precision::kMaster:
        return check_dtype(view.kind == 'f' && view.bits == 32 && view.native, object, "float32");
      default:
        return check_dtype(view.kind == param.kind && view.bits == 16 && view.native, object, dtype_name(param_object));
    }
  }
  check_dtype(view.is_float(), object, "float64, float32, float16 or bfloat16");
  if (!view.native) type_problem("has dtype " + dtype_name(object) + ", must be in native byte order");
  if ((view.kind == 'c') != (param.kind == 'c')) {
    type_problem("has dtype " + dtype_name(object) + ", its parameter has " + dtype_name(param_object));
  }
}

// The format of operand `k` of a parameter of `n` elements. Codes of four bits are half as many bytes.
Format format_of(int k, const Roles& roles, const View& view, std::int64_t n) {
  if (roles.is_codes(k)) {
    const bool halves = view.size() != n, is_unsigned = roles.unsigned_states >> (k - 2) & 1;
    if (halves) return is_unsigned ? Format::kQ4Unsigned : Format::kQ4;
    return is_unsigned ? Format::kQ8Unsigned : Format::kQ8;
  }
  if (roles.has_rest() && k == roles.rest() && roles.precision == Precision::kSplit) return Format::kInt16;
  const bool never_negative = k >= 2 && k < 2 + roles.n_states && (roles.unsigned_states >> (k - 2) & 1);
  return never_negative && view.format() == Format::kFloat16 ? Format::kFloat16Unsigned : view.format();
}

void check_shape(int k, const Roles& roles, const View* views) {
  const View &view = views[k], &param = views[0];
  const std::int64_t n = param.size();
  const auto refuse = [&](const std::string& must_be) {
    value_problem("has shape " + tuple_text(view.ndim, view.shape, view.kind == 'c') + must_be);
  };
  const auto flat = [](std::int64_t size) { return tuple_text(1, &size); };
  const auto is_flat = [&](std::int64_t size) { return view.ndim == 1 && view.size() == size && is_c_contiguous(view); };
  if (roles.is_codes(k)) {
    if (!is_flat(n) && !is_flat((n + 1) / 2)) {
      refuse(", the codes of its parameter are contiguous of shape " + flat(n) + " or " + flat((n + 1) / 2));
    }
  } else if (roles.is_scale(k)) {
    int state = 0;
    while (!roles.is_codes(2 + state) || roles.scale_of(state) != k) ++state;
    const std::int64_t block = block_of(format_of(2 + state, roles, views[2 + state], n)), blocks = (n + block - 1) / block;
    if (!is_flat(blocks)) refuse(", the scales of its parameter are contiguous of shape " + flat(blocks));
  } else if (view.ndim != param.ndim || !std::equal(view.shape, view.shape + view.ndim, param.shape)) {
    refuse(", its parameter has " + tuple_text(param.ndim, param.shape, param.kind == 'c'));
  }
}

void check_place(const View& view, const View& param) {
  if (view.device != param.device) {
    value_problem("is " + place_text(view.device) + ", its parameter is " + place_text(param.device));
  }
}

void check_memory(const View& view) {
  if (view.size() == 0) return;
  if (!view.data) value_problem("has no strided memory of its own (sparse, meta or wrapper tensor)");
  const std::int64_t item = view.item();
  bool aligned = reinterpret_cast<std::uintptr_t>(view.data) % static_cast<std::uintptr_t>(item) == 0;
  for (int d = 0; d < view.ndim; ++d) aligned = aligned && (view.shape[d] == 1 || view.strides[d] % item == 0);
  if (!aligned) {
    value_problem("is misaligned: address " + std::to_string(reinterpret_cast<std::uintptr_t>(view.data)) + " and strides " +
                  tuple_text(view.ndim, view.strides, view.kind == 'c') + " must be multiples of " + std::to_string(item) +
                  " bytes");
  }
}

void check_output(const View& view) {
  if (!view.writable) value_problem("is read-only");
  if (is_c_contiguous(view) || has_distinct_elements(view.ndim, view.shape, view.strides, view.bits / 8)) return;
  value_problem("overlaps itself: shape " + tuple_text(view.ndim, view.shape, view.kind == 'c') + ", strides " +
                tuple_text(view.ndim, view.strides, view.kind == 'c') + " in bytes");
}

}  // namespace

Entry::Change Entry::update(const View* views, const Roles& roles, PyObject* const* objects) {
  thread_local std::vector<std::int64_t> now;
  const int n = roles.n_views();
  now.assign({roles.n_states, roles.extras, roles.n_gradients, static_cast<int>(roles.precision), roles.unsigned_states,
              roles.compressed,
              (roles.writes_gradients ? 1 : 0) | (roles.rows ? 2 : 0) | (roles.always_rows ? 4 : 0) |
                  (roles.reads_only ? 8 : 0) | (roles.counts_elements ? 16 : 0) | (roles.reads_param ? 32 : 0) |
                  (roles.reads_states ? 64 : 0)});
  for (int k = 0; k < n; ++k) {
    if (roles.is_output(k)) append(now, views[k]);
  }
  const std::size_t outputs = now.size();
  for (int k = 0; k < n; ++k) {
    if (!roles.is_output(k)) append(now, views[k]);
  }
  if (now == seen_) return Change::kNone;

  const bool same_outputs =
      seen_.size() >= outputs && std::equal(now.begin(), now.begin() + static_cast<std::ptrdiff_t>(outputs), seen_.begin());
  seen_.clear();
  roles_ = roles;
  check(views, objects);
  lay_out(views);
  seen_ = now;
  return same_outputs ? Change::kGradient : Change::kAll;
}

void Entry::check(const View* views, PyObject* const* objects) const {
  for (int k = 0; k < roles_.n_views(); ++k) {
    try {
      check_type(k, roles_, views[k], views[0], objects[k], objects[0]);
      check_shape(k, roles_, views);
      check_place(views[k], views[0]);
      check_memory(views[k]);
      if (roles_.is_output(k)) check_output(views[k]);
    } catch (Problem& problem) {
      throw OperandProblem{k, std::move(problem)};
    }
  }
}

void Entry::lay_out(const View* views) {
  const View& param = views[0];
  const auto n = static_cast<std::size_t>(roles_.n_views());
  // What stands in the order of the sweep; codes and scales are always contiguous in that of C.
  const auto is_flat = [&](std::size_t k) {
    return roles_.is_codes(static_cast<int>(k)) || roles_.is_scale(static_cast<int>(k));
  };
  bool contiguous = true;
  for (std::size_t k = 0; k < n; ++k) contiguous = contiguous && is_c_contiguous(views[k]);

  // The parts of a complex number are no dimension of their own.
  const int ndim = param.ndim - (param.kind == 'c');
  has_rows_ = ndim >= 2;
  device_ = param.device;
  sweep_.size = param.size();
  sweep_.row = 0;
  if (sweep_.size > 0 && has_rows_ && (roles_.rows || roles_.always_rows)) sweep_.row = sweep_.size / param.shape[0];
  else if (roles_.always_rows) sweep_.row = sweep_.size;

  if (contiguous) {
    layout_ = {};
    layout_.strides.resize(n);
    layout_.offsets.assign(n, 0);
  } else {
    std::vector<const std::int64_t*> strides;
    std::vector<std::int64_t> items;
    for (std::size_t k = 0; k < n; ++k) {
      if (is_flat(k)) continue;
      strides.push_back(views[k].strides);
      items.push_back(views[k].item());
    }
    layout_ = make_layout(param.ndim, param.shape, strides, items, roles_.in_order() || sweep_.row > 0);
    for (std::size_t k = 0; k < n; ++k) {
      if (!is_flat(k)) continue;
      layout_.strides.insert(layout_.strides.begin() + static_cast<std::ptrdiff_t>(k), std::vector<std::int64_t>());
      layout_.offsets.insert(layout_.offsets.begin() + static_cast<std::ptrdiff_t>(k), 0);
    }
  }

  sweep_.n_operands = roles_.rest();
  sweep_.n_states = roles_.n_states;
  sweep_.extras = roles_.extras;
  sweep_.ndim = static_cast<int>(layout_.shape.size());
  sweep_.shape = layout_.shape.data();
  sweep_.compute = Format::kFloat32;
  more_gradients_.resize(static_cast<std::size_t>(roles_.n_gradients - 1));
  sweep_.more_gradients = more_gradients_.data();
  sweep_.n_more_gradients = static_cast<int>(more_gradients_.size());
  spans_.resize(n);
  dense_.resize(n);
  shapes_.resize(n);
  strides_.resize(n);
  items_.resize(n);
  data_.resize(n);
  for (std::size_t k = 0; k < n; ++k) {
    const View& view = views[k];
    if (Operand* operand = operand_at(static_cast<int>(k))) {
      const auto& strides = layout_.strides[k];
      *operand = {view.data + layout_.offsets[k], strides.empty() ? nullptr : strides.data(),
                  format_of(static_cast<int>(k), roles_, view, sweep_.size), nullptr};
      if (operand->format == Format::kFloat64) sweep_.compute = Format::kFloat64;
    }
    data_[k] = view.data;
    items_[k] = view.item();
    shapes_[k].assign(view.shape, view.shape + view.ndim);
    strides_[k].assign(view.strides, view.strides + view.ndim);
    dense_[k] = is_c_contiguous(view);
    spans_[k] = {view.data, view.data};
    if (view.size() == 0) continue;
    std::int64_t low = 0, high = view.item();
    for (int d = 0; d < view.ndim; ++d) {
      const std::int64_t reach = view.strides[d] * (view.shape[d] - 1);
      (reach < 0 ? low : high) += reach;
    }
    spans_[k] = {view.data + low, view.data + high};
  }
  sweep_.kind = (sweep_.row > 0 ? 1 : 0) | std::uint64_t{sweep_.compute == Format::kFloat64} << 63;
  for (int k = 0; k < sweep_.n_operands; ++k) {
    const Operand& operand = sweep_.operands[k];
    sweep_.kind |= static_cast<std::uint64_t>(static_cast<int>(operand.format) << 1 | (operand.strides ? 1 : 0)) << (5 * k + 1);
  }
  for (int state = 0; state < roles_.n_states; ++state) {
    if (!(roles_.compressed >> state & 1)) continue;
    Operand& codes = sweep_.operands[2 + state];
    codes.scales = reinterpret_cast<float*>(views[roles_.scale_of(state)].data);
    const std::int64_t block = block_of(codes.format);
    if (sweep_.row % block == 0 || sweep_.row == sweep_.size) continue;
    throw OperandProblem{2 + state,
                         {PyExc_ValueError, "is compressed in blocks of " + std::to_string(block) +
                                                " elements: stages by row need rows of a multiple, its parameter has rows of " +
                                                std::to_string(sweep_.row)}};
  }
}

// Where the sweep has operand `k`; null for scales.
Operand* Entry::operand_at(int k) {
  if (k < roles_.rest()) return &sweep_.operands[k];
  if (k < roles_.n_arrays()) return &sweep_.rest;
  return roles_.is_scale(k) ? nullptr : &more_gradients_[static_cast<std::size_t>(k - roles_.n_operands())];
}

py::object Entry::as_numpy(int k) const {
  const auto at = static_cast<std::size_t>(k);
  const py::dtype dtype(std::string("u").append(std::to_string(items_[at])));
  return py::array(dtype, shapes_[at], strides_[at], data_[at], py::capsule(data_[at], [](void*) {}));
}

}  // namespace gradstep::python
