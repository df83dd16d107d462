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

class Entry {
 public:
  enum class Change { kNone, kGradient, kAll };

  // Takes the operands (parameter, gradient, states) as they stand now. If anything differs from the last call, checks all of
  // them and lays them out anew; throws OperandProblem. `objects` are only asked for the spelling of their dtypes.
  Change update(const View* views, int n, PyObject* const* objects);

  const Sweep& sweep() const { return sweep_; }

  // The bytes that operand `k` spans, [begin, end), as they stood at the last update; empty if it has no elements.
  struct Span {
    const std::byte *begin, *end;
  };
  Span span(int k) const { return spans_[k]; }

  // Operand `k` as a NumPy array, for an exact question about its memory.
  pybind11::object as_numpy(int k) const;

 private:
  void check(const View* views, int n, PyObject* const* objects) const;
  void lay_out(const View* views, int n);

  std::vector<std::int64_t> seen_;  // addresses, dtypes, shapes and strides: states, parameter, gradient
  Layout layout_;
  Sweep sweep_{};
  Span spans_[kMaxOperands]{};
  std::vector<std::int64_t> shape_, strides_[kMaxOperands];
  std::byte* data_[kMaxOperands]{};
};

}  // namespace gradstep::python
