// One parameter with its gradient and states: checked, laid out, and remembered, so that the next step only has to see that
// nothing moved.
#pragma once

#include <bit>
#include <string>
#include <vector>

#include "../core/layout.h"
#include "../core/sweep.h"
#include "array.h"

namespace gradstep::python {

// Operands of an entry at most, without further gradients.
inline constexpr int kMaxViews = kMaxOperands + 1 + kMaxStates;

// What is wrong with one operand of an entry.
struct OperandProblem {
  int operand;
  Problem problem;
};

// What the operands of an entry are. They come in this order: parameter, gradient, states, extras, what the parameter has no
// room for, scales of states, further gradients.
struct Roles {
  int n_states = 0;
  int n_extras = 0;
  std::uint32_t extras = 0;       // a bit for each Extra that there is
  Precision precision = Precision::kNearest;  // of a parameter of 16 bits
  std::uint32_t unsigned_states = 0;          // a bit each
  std::uint32_t compressed = 0;               // a bit for each state that comes as codes and scales
  int n_gradients = 1;
  bool writes_gradients = false;
  bool reads_only = false;        // nothing is written
  bool reads_param = false;       // the parameter is not written
  bool reads_states = false;      // nor are the states
  bool counts_elements = false;   // elements are visited in the order of C, even without rows
  bool rows = false;              // tensors of at least two dimensions are swept by row
  bool always_rows = false;       // others too, as one row

  bool has_rest() const { return precision > Precision::kStochastic; }
  bool in_order() const { return counts_elements || compressed != 0; }

  int rest() const { return 2 + n_states + n_extras; }
  int n_arrays() const { return rest() + has_rest(); }  // of the parameter's shape but for codes, and no gradients
  int n_operands() const { return n_arrays() + std::popcount(compressed); }  // without the further gradients
  int n_views() const { return n_operands() + n_gradients - 1; }
  bool is_gradient(int k) const { return k == 1 || k >= n_operands(); }
  bool is_codes(int k) const { return k >= 2 && compressed >> (k - 2) & 1; }
  bool is_scale(int k) const { return k >= n_arrays() && k < n_operands(); }
  int scale_of(int state) const { return n_arrays() + std::popcount(compressed & ((1u << state) - 1)); }
  bool is_output(int k) const {
    if (reads_only || (k == 0 && reads_param) || (k > 1 && reads_states)) return false;
    return writes_gradients || !is_gradient(k);
  }
};

class Entry {
 public:
  enum class Change { kNone, kGradient, kAll };

  // Takes the operands as they stand now. If anything differs from the last call, checks all of them and lays them out anew;
  // throws OperandProblem. `objects` are only asked for the spelling of their dtypes.
  Change update(const View* views, const Roles& roles, PyObject* const* objects);

  const Sweep& sweep() const { return sweep_; }
  const Roles& roles() const { return roles_; }
  int device() const { return device_; }
  bool has_rows() const { return has_rows_; }  // two dimensions at least

  // Whether operand `k` lies in memory without gaps, in the order of C.
  bool is_dense(int k) const { return dense_[static_cast<std::size_t>(k)]; }

  // The bytes that operand `k` spans, [begin, end), as they stood at the last update; empty if it has no elements.
  struct Span {
    const std::byte *begin, *end;
  };
  Span span(int k) const { return spans_[static_cast<std::size_t>(k)]; }

  // Operand `k` as a NumPy array, for an exact question about its memory.
  pybind11::object as_numpy(int k) const;

 private:
  void check(const View* views, PyObject* const* objects) const;
  void lay_out(const View* views);
  Operand* operand_at(int k);

  std::vector<std::int64_t> seen_;  // roles; addresses, dtypes, shapes and strides: outputs, then gradients
  Roles roles_;
  Layout layout_;
  Sweep sweep_{};
  bool has_rows_ = false;
  int device_ = kHost;
  std::vector<Operand> more_gradients_;
  std::vector<Span> spans_;
  std::vector<bool> dense_;
  std::vector<std::vector<std::int64_t>> shapes_, strides_;
  std::vector<std::int64_t> items_;
  std::vector<std::byte*> data_;
};

}  // namespace gradstep::python
