#include "layout.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>

namespace gradstep {

Layout make_layout(int ndim, const std::int64_t* shape, const std::vector<const std::int64_t*>& strides,
                   const std::vector<std::int64_t>& items, bool in_order) {
  const std::size_t n_operands = strides.size();
  Layout layout;
  layout.offsets.assign(n_operands, 0);
  layout.strides.resize(n_operands);

  std::vector<int> order;
  for (int d = 0; d < ndim; ++d) {
    if (shape[d] != 1) order.push_back(d);
  }
  // Outermost first: the widest stride of the first operand; where those agree, of the next operand.
  const auto wider = [&](int a, int b) {
    for (const std::int64_t* s : strides) {
      if (std::abs(s[a]) != std::abs(s[b])) return std::abs(s[a]) > std::abs(s[b]);
    }
    return false;
  };
  if (!in_order) std::stable_sort(order.begin(), order.end(), wider);

  for (const int d : order) {
    std::vector<std::int64_t> step(n_operands);
    const bool reversed = !in_order && strides[0][d] < 0;
    for (std::size_t k = 0; k < n_operands; ++k) {
      step[k] = reversed ? -strides[k][d] : strides[k][d];
      if (reversed) layout.offsets[k] += (shape[d] - 1) * strides[k][d];
    }
    bool merges = !layout.shape.empty();
    for (std::size_t k = 0; k < n_operands && merges; ++k) merges = layout.strides[k].back() == step[k] * shape[d];
    if (merges) {
      layout.shape.back() *= shape[d];
      for (std::size_t k = 0; k < n_operands; ++k) layout.strides[k].back() = step[k];
    } else {
      layout.shape.push_back(shape[d]);
      for (std::size_t k = 0; k < n_operands; ++k) layout.strides[k].push_back(step[k]);
    }
  }

  for (std::size_t k = 0; k < n_operands; ++k) {
    auto& s = layout.strides[k];
    std::int64_t expected = items[k];
    bool contiguous = true;
    for (std::size_t d = layout.shape.size(); d-- > 0;) {
      contiguous = contiguous && s[d] == expected;
      expected *= layout.shape[d];
    }
    if (contiguous) s.clear();
  }
  return layout;
}

bool has_distinct_elements(int ndim, const std::int64_t* shape, const std::int64_t* strides, std::int64_t item) {
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;  // stride, size
  std::int64_t size = 1;
  for (int d = 0; d < ndim; ++d) {
    size *= shape[d];
    if (shape[d] > 1) dims.emplace_back(std::abs(strides[d]), shape[d]);
  }
  if (size == 0) return true;

  std::sort(dims.begin(), dims.end());
  std::int64_t extent = item;  // bytes that the dimensions so far span
  bool nested = true;
  for (const auto& [stride, n] : dims) {
    nested = nested && stride >= extent;
    extent += stride * (n - 1);
  }
  if (nested) return true;
  if (size > std::int64_t{1} << 24) return false;

  std::vector<std::int64_t> addresses{0};
  addresses.reserve(static_cast<std::size_t>(size));
  for (const auto& [stride, n] : dims) {
    const std::size_t inner = addresses.size();
    for (std::int64_t i = 1; i < n; ++i) {
      for (std::size_t j = 0; j < inner; ++j) addresses.push_back(addresses[j] + i * stride);
    }
  }
  std::sort(addresses.begin(), addresses.end());
  for (std::size_t i = 1; i < addresses.size(); ++i) {
    if (addresses[i] - addresses[i - 1] < item) return false;
  }
  return true;
}

}  // namespace gradstep
