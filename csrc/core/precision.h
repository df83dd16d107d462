// Parameters of 16 bits that keep what they have no room for in a second array, the rest: docs/formats.md.
#pragma once

#include "formats.h"
#include "math.h"

namespace gradstep {

// The largest rest that a number of 16 bits can leave: half a unit in its last place.
template <class Half>
GRADSTEP_HD float largest_rest(float p) {
  const float half_unit = float_of(bits_of(p) & kInfinityBits) * Half::kHalfUnit;
  return half_unit > Half::kLeastHalfUnit ? half_unit : Half::kLeastHalfUnit;
}

template <class Half, class T>
GRADSTEP_HD float rounded_to(T x) {
  return Half::template decode<float>(Half::encode(x));
}

// The number that p, as it is stored, and the rest stand for. A rest that is none of this p is left out: somebody has written
// to p.
template <Precision kPrecision, class Half, class T>
GRADSTEP_HD T joined(T p, T rest) {
  if constexpr (kPrecision == Precision::kKahan) {
    return p + (magnitude(rest) <= T(largest_rest<Half>(static_cast<float>(p))) ? rest : T(0));
  } else if constexpr (kPrecision == Precision::kMaster) {
    return T(rounded_to<Half>(rest)) == p ? rest : p;
  } else {
    const auto upper = static_cast<float>(p);
    const float whole = float_of(bits_of(upper) + static_cast<std::uint32_t>(static_cast<std::int32_t>(rest)));
    return T(bits_of(BFloat16::upper_half(whole)) == bits_of(upper) ? whole : upper);
  }
}

// stored <- what p becomes in its 16 bits; rest <- what is kept beside.
template <Precision kPrecision, class Half, class T>
GRADSTEP_HD void part_in_two(T p, T& stored, T& rest) {
  if constexpr (kPrecision == Precision::kKahan) {
    stored = T(rounded_to<Half>(p));
    const T left = p - stored;
    rest = left - left == T(0) ? left : T(0);  // nothing beside an infinity
  } else if constexpr (kPrecision == Precision::kMaster) {
    stored = rest = T(static_cast<float>(p));
  } else {
    const auto number = static_cast<float>(p);
    const float upper = BFloat16::upper_half(number);
    stored = T(upper);
    const auto lower = static_cast<std::int32_t>(bits_of(number) - bits_of(upper));
    rest = number == number ? T(lower) : T(0);
  }
}

// Calls call.operator()<kPrecision, Half>() for a precision that keeps a rest.
template <class Call>
GRADSTEP_HD void visit_precision(Precision precision, Format half, Call call) {
  if (precision == Precision::kSplit) call.template operator()<Precision::kSplit, BFloat16>();
  else if (precision == Precision::kKahan && half == Format::kFloat16) call.template operator()<Precision::kKahan, Float16>();
  else if (precision == Precision::kKahan) call.template operator()<Precision::kKahan, BFloat16>();
  else if (half == Format::kFloat16) call.template operator()<Precision::kMaster, Float16>();
  else call.template operator()<Precision::kMaster, BFloat16>();
}

}  // namespace gradstep
