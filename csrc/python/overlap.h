// Overlap: which operands of a step share memory.
#pragma once

#include <vector>

#include "entry.h"

namespace gradstep::python {

// An operand of an entry of the step.
struct OperandRef {
  int entry, operand;
};

// Where what a step writes lies in memory.
class Outputs {
 public:
  struct Clash {
    bool found = false;
    OperandRef first{}, second{};
  };

  // Takes the outputs (parameters, states, what else is written) of all entries. Reports two that share memory.
  Clash assign(const std::vector<const Entry*>& entries);

  // Reports an output that shares memory with a gradient of `entry` that is only read.
  Clash clash_with_gradients(int entry, const std::vector<const Entry*>& entries) const;

 private:
  struct Item {
    Entry::Span span;
    OperandRef ref;
  };
  std::vector<Item> items_;                 // by where they begin
  std::vector<const std::byte*> reach_;     // the largest end of items_[0..i]
};

}  // namespace gradstep::python
