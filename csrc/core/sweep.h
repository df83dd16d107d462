// A sweep: one tensor, its gradient and its states, carried through a pipeline in one pass over memory.
//
//   load (decode) -> gradient stages -> rule -> update stages -> parameter stages -> store (encode)
//
// All of it is plain data, checked and filled in before the first byte is written; an engine only runs it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace gradstep {

struct Sums;
struct Pipeline;

// Elements that go through the pipeline together where a scratch copy is needed, so that the copies stay in the L1 cache. Also
// the leaf of a sum.
inline constexpr std::int64_t kTile = 1024;

// Elements of a block of leaves: sweeps that sum are cut at multiples of it.
inline constexpr std::int64_t kSumBlock = 16 * kTile;

// Rows that go through the pipeline together where they are short.
inline constexpr std::int64_t kMaxRows = 256;

inline constexpr int kMaxDims = 64;

// Arrays that are kept beside a parameter after the update: averages, slow weights.
enum Extra { kEma, kSwa, kSlow, kMaxExtras };

// The operands of one sweep: parameter, gradient, states, extras. Further gradients stand apart.
inline constexpr int kMaxOperands = 2 + kMaxStates + kMaxExtras;

// Numbers of one tensor's step that no other tensor need share; most follow from sums over the tensor.
struct Factors {
  double gradient = 1;   // of norms: clipping
  double decayed = 1;    // of the gradient with its coupled decay: LARS
  double cautious = 1;
  double trust = 1;      // of the update, as the rule's loop makes it
  double late_trust = 1; // of an update that other stages change first
};

// What follows from the sums over a row, for the next pass over it.
struct RowValues {
  double factor = 1, mean = 0;
};

// What is summed up by row.
struct RowSums {
  double grad_squares = 0, grad = 0, param_squares = 0;
};

// How they follow: see factors.h.
enum class RowResult : std::uint8_t { kNone, kGradient, kGroupLasso, kMaxNorm };

struct Operand {
  std::byte* data;
  const std::int64_t* strides;  // in bytes, one a dimension of the sweep; null: contiguous in the order of the sweep
  Format format;
  float* scales = nullptr;  // of a format in blocks, which is contiguous in the order of C

  GRADSTEP_HD bool is_in_place(Format compute) const { return !strides && format == compute; }
};

struct Sweep {
  Operand operands[kMaxOperands];  // parameter, gradient, states, then extras
  Operand rest;                    // what the parameter's format has no room for, if anything keeps it
  int n_operands, n_states;
  std::uint32_t extras;            // which of them there are, a bit each
  const Operand* more_gradients;
  int n_more_gradients;
  int ndim;                        // of the dimensions that strided operands share
  const std::int64_t* shape;
  std::int64_t size;               // elements
  std::int64_t row;                // elements of a row, in the order of C; 0 where nothing asks for rows
  Format compute;                  // the type that rule and stages work in
  std::uint64_t kind;  // formats, contiguity, rows and compute type: what pipelines depend on, of all that stands here

  // Bytes of all operands together.
  GRADSTEP_HD std::int64_t bytes() const {
    std::int64_t bits = 0;
    for (int k = 0; k < n_operands; ++k) bits += bits_of(operands[k].format);
    return size * bits / 8;
  }
  // Elements of a block of sums.
  GRADSTEP_HD std::int64_t block() const { return row == 0 ? kSumBlock : rows_in(kSumBlock) * row; }
  // Elements of the rows that go through all passes together.
  GRADSTEP_HD std::int64_t group() const { return (rows_in(kTile) < kMaxRows ? rows_in(kTile) : kMaxRows) * row; }
  GRADSTEP_HD std::int64_t n_blocks() const { return (size + block() - 1) / block(); }
  // Whole rows in so many elements, one at least.
  GRADSTEP_HD std::int64_t rows_in(std::int64_t elements) const { return row < elements ? elements / row : 1; }
};

// What an engine is given to run.
struct Work {
  const Sweep* sweep;
  const Pipeline* pipeline;
  Factors factors = {};
  Sums* sums = nullptr;  // one a block
  std::uint32_t stream = 0, step = 0;  // of random numbers: the parameter's position and the number of its step
};

}  // namespace gradstep
