// Layout: in which order a sweep visits the elements of its operands.
#pragma once

#include <cstdint>
#include <vector>

namespace gradstep {

// The dimensions that a set of operands of equal shape share, reordered so that memory is walked along the first operand, with
// neighbours merged where every operand allows it. Dense operands of one layout (C, Fortran, channels_last, reversed, ...)
// collapse into a single contiguous run.
struct Layout {
  std::vector<std::int64_t> shape;
  std::vector<std::vector<std::int64_t>> strides;  // bytes; one list an operand, empty where it is contiguous in this order
  std::vector<std::int64_t> offsets;               // bytes from an operand's address to its first element in this order
};

// `strides[k]` are the strides in bytes of operand k, of `ndim` dimensions `shape`, whose items have `items[k]` bytes.
// `in_order`: the elements are to be visited in the order of C, whatever their order in memory.
Layout make_layout(int ndim, const std::int64_t* shape, const std::vector<const std::int64_t*>& strides,
                   const std::vector<std::int64_t>& items, bool in_order);

// Whether no two elements of an array share memory. Exact up to 2^24 elements; beyond that, an array whose dimensions
// interleave in an order that no nesting explains counts as overlapping.
bool has_distinct_elements(int ndim, const std::int64_t* shape, const std::int64_t* strides, std::int64_t item);

}  // namespace gradstep
