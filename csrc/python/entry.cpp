#include "entry.h"

#include <pybind11/numpy.h>

#include <algorithm>

namespace gradstep::python {
namespace py = pybind11;
namespace {

void append(std::vector<std::int64_t>& seen, const View& view) {
  seen.push_back(static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(view.data)));
  seen.push_back(view.kind | view.bits << 8 | (view.native ? 1 << 24 : 0) | (view.writable ? 1 << 25 : 0));
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

void check_type(const View& view, const View& param, PyObject* object, PyObject* param_object, bool is_param) {
  if (!view.is_real()) type_problem("has dtype " + dtype_name(object) + ", must be float32 or float64");
  if (!view.native) type_problem("has dtype " + dtype_name(object) + ", must be in native byte order");
  if (!is_param && (view.kind != param.kind || view.bits != param.bits)) {
    type_problem("has dtype " + dtype_name(object) + ", its parameter has " + dtype_name(param_object));
  }
}

void check_shape(const View& view, const View& param) {
  if (view.ndim == param.ndim && std::equal(view.shape, view.shape + view.ndim, param.shape)) return;
  value_problem("has shape " + tuple_text(view.ndim, view.shape, view.kind == 'c') + ", its parameter has " +
                tuple_text(param.ndim, param.shape, param.kind == 'c'));
}

void check_memory(const View& view) {
  if (view.size() == 0) return;
  if (!view.data) value_problem("has no strided memory of its own (sparse, meta or wrapper tensor)");
  const std::int64_t item = view.bits / 8;
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
  now.assign({roles.n_states, roles.extras, roles.n_gradients,
              (roles.writes_gradients ? 1 : 0) | (roles.rows ? 2 : 0) | (roles.always_rows ? 4 : 0) |
                  (roles.reads_only ? 8 : 0) | (roles.in_order ? 16 : 0)});
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
      check_type(views[k], views[0], objects[k], objects[0], k == 0);
      check_shape(views[k], views[0]);
      check_memory(views[k]);
      if (roles_.is_output(k)) check_output(views[k]);
    } catch (Problem& problem) {
      throw OperandProblem{k, std::move(problem)};
    }
  }
}

void Entry::lay_out(const View* views) {
  const View& param = views[0];
  const std::int64_t item = param.bits / 8;
  const auto n = static_cast<std::size_t>(roles_.n_views());
  bool contiguous = true;
  for (std::size_t k = 0; k < n; ++k) contiguous = contiguous && is_c_contiguous(views[k]);

  // The parts of a complex number are no dimension of their own.
  const int ndim = param.ndim - (param.kind == 'c');
  has_rows_ = ndim >= 2;
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
    for (std::size_t k = 0; k < n; ++k) strides.push_back(views[k].strides);
    layout_ = make_layout(param.ndim, param.shape, strides, item, roles_.in_order || sweep_.row > 0);
  }

  shape_.assign(param.shape, param.shape + param.ndim);
  sweep_.n_operands = roles_.n_operands();
  sweep_.n_states = roles_.n_states;
  sweep_.extras = roles_.extras;
  sweep_.ndim = static_cast<int>(layout_.shape.size());
  sweep_.shape = layout_.shape.data();
  sweep_.compute = param.format();
  more_gradients_.resize(n - static_cast<std::size_t>(sweep_.n_operands));
  sweep_.more_gradients = more_gradients_.data();
  sweep_.n_more_gradients = static_cast<int>(more_gradients_.size());
  spans_.resize(n);
  strides_.resize(n);
  data_.resize(n);
  for (std::size_t k = 0; k < n; ++k) {
    const bool further = k >= static_cast<std::size_t>(sweep_.n_operands);
    Operand& operand = further ? more_gradients_[k - static_cast<std::size_t>(sweep_.n_operands)] : sweep_.operands[k];
    const auto& strides = layout_.strides[k];
    operand = {views[k].data + layout_.offsets[k], strides.empty() ? nullptr : strides.data(), views[k].format()};
    data_[k] = views[k].data;
    strides_[k].assign(views[k].strides, views[k].strides + views[k].ndim);
    spans_[k] = {views[k].data, views[k].data};
    if (sweep_.size == 0) continue;
    std::int64_t low = 0, high = item;
    for (int d = 0; d < param.ndim; ++d) {
      const std::int64_t reach = views[k].strides[d] * (param.shape[d] - 1);
      (reach < 0 ? low : high) += reach;
    }
    spans_[k] = {views[k].data + low, views[k].data + high};
  }
}

const std::int64_t* Entry::strides_of(int k) const {
  return k < sweep_.n_operands ? sweep_.operands[k].strides
                               : more_gradients_[static_cast<std::size_t>(k - sweep_.n_operands)].strides;
}

py::object Entry::as_numpy(int k) const {
  const auto at = static_cast<std::size_t>(k);
  const py::dtype dtype(sweep_.compute == Format::kFloat32 ? "float32" : "float64");
  return py::array(dtype, shape_, strides_[at], data_[at], py::capsule(data_[at], [](void*) {}));
}

}  // namespace gradstep::python
