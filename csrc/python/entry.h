// One parameter with its gradient and states: checked, laid out, and remembered, so that the next step only has to see that
// nothing moved.
#pragma once

#include <string>
#include <vector>

#include "../core/layout.h"
#include "../core/sweep.h"
#include "array.h"

namespace gradstep::python {

// What is wrong with one operand of an entry.
struct OperandProblem {
  int operand;
  Problem problem;
};

// What the operands of an entry are. They come in this order: parameter, gradient, states, extras, further gradients.
struct Roles {
  int n_states = 0;
  int n_extras = 0;
  std::uint32_t extras = 0;       // a bit for each Extra that there is
  int n_gradients = 1;
  bool writes_gradients = false;
  bool reads_only = false;        // nothing is written
  bool in_order = false;          // elements are visited in the order of C, even without rows
  bool rows = false;              // tensors of at least two dimensions are swept by row
  bool always_rows = false;       // others too, as one row

  int n_operands() const { return 2 + n_states + n_extras; }      // without the further gradients
  int n_views() const { return n_operands() + n_gradients - 1; }
  bool is_gradient(int k) const { return k == 1 || k >= n_operands(); }
  bool is_output(int k) const { return !reads_only && (writes_gradients || !is_gradient(k)); }
};

class Entry {
 public:
  enum class Change { kNone, kGradient, kAll };

  // Takes the operands as they stand now. If anything differs from the last call, checks all of them and lays them out anew;
  // throws OperandProblem. `objects` are only asked for the spelling of their dtypes.
  Change update(const View* views, const Roles& roles, PyObject* const* objects);

  const Sweep& sweep() const { return sweep_; }
  const Roles& roles() const { return roles_; }
  bool has_rows() const { return has_rows_; }  // two dimensions at least

  // Whether operand `k` lies in memory without gaps, in the order of the sweep.
  bool is_dense(int k) const { return layout_.shape.empty() && strides_of(k) == nullptr; }

  // The bytes that operand `k` spans, [begin, end), as they stood at the last update; empty if it has no elements.
  struct Span {
    const std::byte *begin, *end;
  };
  Span span(int k) const { return spans_[static_cast<std::size_t>(k)]; }

  // Operand `k` as a NumPy array, for an exact question about its memory.
  pybind11::object as_numpy(int k) const;

 private:
  const std::int64_t* strides_of(int k) const;
  void check(const View* views, PyObject* const* objects) const;
  void lay_out(const View* views);

  std::vector<std::int64_t> seen_;  // roles; addresses, dtypes, shapes and strides: outputs, then gradients
  Roles roles_;
  Layout layout_;
  Sweep sweep_{};
  bool has_rows_ = false;
  std::vector<Operand> more_gradients_;
  std::vector<Span> spans_;
  std::vector<std::int64_t> shape_;
  std::vector<std::vector<std::int64_t>> strides_;
  std::vector<std::byte*> data_;
};

}  // namespace gradstep::python
