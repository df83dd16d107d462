// Formats: how numbers are stored. A format decodes to a compute type and encodes from it; it knows no rule. An operand that is
// stored contiguously in the compute type itself is never decoded: the rule works on it in place.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rule.h"

namespace gradstep {

enum class Format : std::uint8_t { kFloat32, kFloat64 };

struct Float32 {
  using Stored = float;
  template <class T>
  GRADSTEP_HD static T decode(float x) {
    return T(x);
  }
  template <class T>
  GRADSTEP_HD static float encode(T x) {
    return float(x);
  }
};

struct Float64 {
  using Stored = double;
  template <class T>
  GRADSTEP_HD static T decode(double x) {
    return T(x);
  }
  template <class T>
  GRADSTEP_HD static double encode(T x) {
    return double(x);
  }
};

// In the order of `Format`.
using Formats = List<Float32, Float64>;

constexpr std::size_t item_size(Format format) { return format == Format::kFloat32 ? 4 : 8; }

}  // namespace gradstep
