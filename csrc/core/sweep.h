// A sweep: one tensor, its gradient and its states, carried through a pipeline in one pass over memory.
//
//   load (decode) -> gradient stages -> rule -> parameter -> store (encode)
//
// All of it is plain data, checked and filled in before the first byte is written; an engine only runs it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace gradstep {

// Elements that go through the pipeline together where a scratch copy is needed, so that the copies stay in the L1 cache.
inline constexpr std::int64_t kTile = 1024;

inline constexpr int kMaxDims = 64;

// The operands of one sweep: parameter, gradient, states.
inline constexpr int kMaxOperands = 2 + kMaxStates;

// A run of elements on its way through the pipeline. Pointers lead to the operand itself where it is stored contiguously in the
// compute type, else to a decoded copy. A gradient is never written: a stage that changes it writes `scratch` and redirects.
template <class T>
struct Tile {
  T* param;
  const T* grad;
  T* scratch;
  T* states[kMaxStates];
  std::int64_t size;
  bool prefetch;  // the operands come from memory, not from a cache
};

// One loop over a tile (a `Tile<T>` of the operation's own compute type) with its constants.
using Operation = void (*)(const std::byte* constants, void* tile);

// The operations of one step in the order in which the data flows, with their constants.
struct Pipeline {
  static constexpr int kMaxOperations = 8;
  static constexpr std::size_t kConstantBytes = 96;

  Operation operations[kMaxOperations];
  alignas(16) std::byte constants[kMaxOperations][kConstantBytes];
  int size = 0;
  bool needs_scratch = false;  // an operation redirects the gradient
};

struct Operand {
  std::byte* data;
  const std::int64_t* strides;  // in bytes, one a dimension of the sweep; null: contiguous in the order of the sweep
  Format format;
};

struct Sweep {
  Operand operands[kMaxOperands];  // parameter, gradient, states
  int n_operands;
  int ndim;  // of the dimensions that strided operands share
  const std::int64_t* shape;
  std::int64_t size;  // elements
  Format compute;     // the type that rule and stages work in
};

// What an engine is given to run.
struct Work {
  const Sweep* sweep;
  const Pipeline* pipeline;
};

}  // namespace gradstep
