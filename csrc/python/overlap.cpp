#include "overlap.h"

#include <algorithm>

namespace gradstep::python {
namespace py = pybind11;
namespace {

bool apart(const Entry::Span& a, const Entry::Span& b) { return a.end <= b.begin || b.end <= a.begin; }

// Whether two operands whose spans intersect have an element in common. Interleaved views, two columns of a matrix for one,
// have not. What NumPy can't decide within a million steps counts as sharing.
bool share_memory(const Entry& a, int operand_a, const Entry& b, int operand_b) {
  if (a.is_dense(operand_a) && b.is_dense(operand_b)) return true;
  try {
    const auto shares = py::module_::import("numpy").attr("shares_memory");
    return shares(a.as_numpy(operand_a), b.as_numpy(operand_b), py::arg("max_work") = 1000000).cast<bool>();
  } catch (py::error_already_set&) {
    return true;
  }
}

}  // namespace

Outputs::Clash Outputs::assign(const std::vector<const Entry*>& entries) {
  items_.clear();
  for (std::size_t i = 0; i < entries.size(); ++i) {
    for (int k = 0; k < entries[i]->roles().n_views(); ++k) {
      const Entry::Span span = entries[i]->span(k);
      if (entries[i]->roles().is_output(k) && span.begin != span.end) items_.push_back({span, {static_cast<int>(i), k}});
    }
  }
  std::sort(items_.begin(), items_.end(), [](const Item& a, const Item& b) { return a.span.begin < b.span.begin; });
  reach_.clear();
  for (std::size_t i = 0; i < items_.size(); ++i) {
    for (std::size_t j = i; j-- > 0 && reach_[j] > items_[i].span.begin;) {
      if (apart(items_[i].span, items_[j].span)) continue;
      const OperandRef a = items_[j].ref, b = items_[i].ref;
      if (!share_memory(*entries[static_cast<std::size_t>(a.entry)], a.operand, *entries[static_cast<std::size_t>(b.entry)],
                        b.operand))
        continue;
      const bool in_order = a.entry != b.entry ? a.entry < b.entry : a.operand < b.operand;
      return {true, in_order ? a : b, in_order ? b : a};
    }
    reach_.push_back(i == 0 ? items_[i].span.end : std::max(reach_.back(), items_[i].span.end));
  }
  return {};
}

Outputs::Clash Outputs::clash_with_gradients(int entry, const std::vector<const Entry*>& entries) const {
  const Entry& owner = *entries[static_cast<std::size_t>(entry)];
  for (int k = 1; k < owner.roles().n_views(); ++k) {
    const Entry::Span span = owner.span(k);
    if (owner.roles().is_output(k) || span.begin == span.end) continue;
    auto after = std::lower_bound(items_.begin(), items_.end(), span.end,
                                  [](const Item& item, const std::byte* end) { return item.span.begin < end; });
    for (std::size_t j = static_cast<std::size_t>(after - items_.begin()); j-- > 0 && reach_[j] > span.begin;) {
      if (apart(items_[j].span, span)) continue;
      const OperandRef ref = items_[j].ref;
      if (share_memory(*entries[static_cast<std::size_t>(ref.entry)], ref.operand, owner, k)) return {true, ref, {entry, k}};
    }
  }
  return {};
}

}  // namespace gradstep::python
