// Formats: how numbers are stored. A format decodes to a compute type and encodes from it; it knows no rule. An operand that is
// stored contiguously in the compute type itself is never decoded: the rule works on it in place. docs/formats.md is the
// specification.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "rule.h"

namespace gradstep {

enum class Format : std::uint8_t {
  kFloat32,
  kFloat64,
  kFloat16,
  kBFloat16,
  kInt16,
  kFloat16Unsigned,
  kQ8,
  kQ8Unsigned,
  kQ4,
  kQ4Unsigned
};

// What becomes of the bits that a 16-bit parameter has no room for.
enum class Precision : std::uint8_t { kNearest, kStochastic, kKahan, kMaster, kSplit };

// ---- bits -----------------------------------------------------------------------------------------------------------------

GRADSTEP_HD std::uint32_t bits_of(float x) { return std::bit_cast<std::uint32_t>(x); }
GRADSTEP_HD float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }

inline constexpr std::uint32_t kSignBit = 0x80000000u, kInfinityBits = 0x7f800000u;

// A float from which rounding to fewer bits gives what rounding `x` itself would: towards zero, with the last bit set where
// something is lost.
GRADSTEP_HD float narrow(float x) { return x; }
GRADSTEP_HD float narrow(double x) {
  const float nearest = static_cast<float>(x);
  const double back = nearest;
  const bool exact = back == x || x != x, beyond = (back < 0 ? -back : back) > (x < 0 ? -x : x);
  const std::uint32_t bits = bits_of(nearest);
  return float_of(exact ? bits : (bits - (beyond ? 1 : 0)) | 1);
}

// ---- one number at a time -------------------------------------------------------------------------------------------------

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

struct Float16 {
  using Stored = std::uint16_t;
  static constexpr std::uint32_t kExponents = 112u << 23;  // between the biases of float and half
  static constexpr float kHalfUnit = 0x1p-11f, kLeastHalfUnit = 0x1p-25f;  // in its last place: of its binade, and at all

  template <class T>
  GRADSTEP_HD static T decode(std::uint16_t stored) {
    const std::uint32_t half = stored, sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
    const std::uint32_t quiet = rest > 0x7c00u ? 0x400000u : 0;
    const std::uint32_t normal = ((rest << 13) + (rest >= 0x7c00u ? 2 * kExponents : kExponents)) | quiet;
    const std::uint32_t subnormal = bits_of(static_cast<float>(static_cast<std::int32_t>(rest)) * 0x1p-24f);
    return T(float_of(sign | (rest < 0x400u ? subnormal : normal)));
  }

  template <class T>
  GRADSTEP_HD static std::uint16_t encode(T number) {
    const std::uint32_t bits = bits_of(narrow(number)), rest = bits & ~kSignBit;
    const std::uint32_t normal = (rest - kExponents + 0xfffu + (rest >> 13 & 1)) >> 13;
    const std::uint32_t subnormal = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);  // the sum is rounded at 2^-24
    return finish(bits, rest < 0x38800000u ? subnormal : normal);
  }

  // Up or down, as 16 random bits say.
  GRADSTEP_HD static std::uint16_t encode_by_chance(float number, std::uint32_t draw) {
    const std::uint32_t bits = bits_of(number), rest = bits & ~kSignBit;
    const std::uint32_t normal = (rest - kExponents + (draw >> 3)) >> 13;
    const float steps = (rest < 0x38800000u ? float_of(rest) : 0.0f) * 0x1p40f;
    const std::uint32_t subnormal = (static_cast<std::uint32_t>(static_cast<std::int32_t>(steps)) + draw) >> 16;
    return finish(bits, rest < 0x38800000u ? subnormal : normal);
  }

 private:
  GRADSTEP_HD static std::uint16_t finish(std::uint32_t bits, std::uint32_t magnitude) {
    const std::uint32_t rest = bits & ~kSignBit;
    const std::uint32_t large = rest > kInfinityBits ? 0x7e00u | (rest >> 13 & 0x3ffu) : 0x7c00u;
    return static_cast<std::uint16_t>((bits & kSignBit) >> 16 | (rest >= 0x47800000u ? large : magnitude));
  }
};

// Of a number that is never negative, and that an update divides by the root of: what is not zero stays so.
struct Float16Unsigned {
  using Stored = std::uint16_t;
  template <class T>
  GRADSTEP_HD static T decode(std::uint16_t stored) {
    return Float16::decode<T>(stored);
  }
  template <class T>
  GRADSTEP_HD static std::uint16_t encode(T number) {
    return raised(Float16::encode(number), number > T(0));
  }
  GRADSTEP_HD static std::uint16_t encode_by_chance(float number, std::uint32_t draw) {
    return raised(Float16::encode_by_chance(number, draw), number > 0);
  }

 private:
  GRADSTEP_HD static std::uint16_t raised(std::uint16_t half, bool positive) {
    return static_cast<std::uint16_t>(half | (half == 0 && positive ? 1 : 0));
  }
};

struct BFloat16 {
  using Stored = std::uint16_t;
  static constexpr float kHalfUnit = 0x1p-8f, kLeastHalfUnit = 0;

  template <class T>
  GRADSTEP_HD static T decode(std::uint16_t stored) {
    return T(float_of(static_cast<std::uint32_t>(stored) << 16));
  }

  template <class T>
  GRADSTEP_HD static std::uint16_t encode(T number) {
    const std::uint32_t bits = bits_of(narrow(number));
    return finish(bits, bits + 0x7fffu + (bits >> 16 & 1));
  }

  GRADSTEP_HD static std::uint16_t encode_by_chance(float number, std::uint32_t draw) {
    const std::uint32_t bits = bits_of(number);
    return finish(bits, bits + draw);
  }

  // The upper half of a float in two: to nearest, ties away from zero, so that the rest fits 16 bits. As a float.
  GRADSTEP_HD static float upper_half(float number) {
    const std::uint32_t bits = bits_of(number);
    return float_of(static_cast<std::uint32_t>(finish(bits, bits + 0x8000u)) << 16);
  }

 private:
  GRADSTEP_HD static std::uint16_t finish(std::uint32_t bits, std::uint32_t rounded) {
    const bool nan = (bits & ~kSignBit) > kInfinityBits;
    return static_cast<std::uint16_t>((nan ? bits | 0x400000u : rounded) >> 16);
  }
};

// The lower half of a float in two.
struct Int16 {
  using Stored = std::int16_t;
  template <class T>
  GRADSTEP_HD static T decode(std::int16_t x) {
    return T(x);
  }
  template <class T>
  GRADSTEP_HD static std::int16_t encode(T x) {
    return static_cast<std::int16_t>(static_cast<std::int32_t>(x));
  }
};

// ---- blocks ---------------------------------------------------------------------------------------------------------------

// Numbers in blocks that share a scale. A code of `kBits` bits is a floating-point number of its own with a mantissa of
// `kMantissa` bits: the upper bits of a float, counted so that the largest is 1.
template <int kBits, int kMantissa, bool kSigned>
struct Minifloat {
  static constexpr int bits = kBits;
  static constexpr std::int64_t block = kBits == 8 ? 256 : 128;
  static constexpr std::uint32_t kLargest = (1u << (kBits - kSigned)) - 1;  // magnitude
  static constexpr std::uint32_t kCut = 23 - kMantissa, kBase = (127u << kMantissa) - kLargest;

  GRADSTEP_HD static float decode(std::uint32_t code) {
    const std::uint32_t magnitude = code & kLargest;
    const std::uint32_t sign = kSigned ? (code & (kLargest + 1)) << (32 - kBits) : 0;
    return float_of(sign | (magnitude == 0 ? 0 : (magnitude + kBase) << kCut));
  }

  // `y` is |x| in units of the block's scale, at most 1 but for its own rounding; `sign` has the sign of x in its highest bit.
  // Ties go up. `draw`: 16 random bits.
  template <bool kByChance>
  GRADSTEP_HD static std::uint32_t encode(float y, std::uint32_t sign, std::uint32_t draw) {
    const auto at = static_cast<std::int32_t>(bits_of(y));
    const std::int32_t up = kByChance ? static_cast<std::int32_t>(draw << (7 - kMantissa)) : 1 << (kCut - 1);
    const std::int32_t rounded = (at + up - static_cast<std::int32_t>(kBase << kCut)) >> kCut;
    // What is under the smallest number: a second moment is never zero, others are as near to zero as to it.
    constexpr auto kHalfOfSmallest = static_cast<std::int32_t>(((kBase + 1) << kCut) - (1u << 23));
    const std::int32_t least = at >= (kSigned ? kHalfOfSmallest : 1) ? 1 : 0;
    const std::int32_t magnitude = rounded > least ? rounded : least;
    return static_cast<std::uint32_t>(magnitude) | (kSigned ? sign >> (32 - kBits) & (kLargest + 1) : 0);
  }
};

// The scale of a block whose largest magnitude has these bits; NaN where it is not finite.
GRADSTEP_HD float block_scale(std::uint32_t largest) {
  constexpr std::uint32_t kLeastNormal = 0x00800000u;
  return float_of(largest < kLeastNormal ? 0 : largest < kInfinityBits ? largest : kInfinityBits | 0x400000u);
}

// What brings the numbers of a block into units of its scale: x before factor.
struct BlockInverse {
  float before, factor;

  GRADSTEP_HD explicit BlockInverse(float scale) {
    constexpr std::uint32_t kLarge = 252u << 23;  // 2^125: from there on the inverse would be subnormal
    const std::uint32_t bits = bits_of(scale);
    before = bits < kLarge ? 1.0f : 0x1p-4f;
    factor = bits - 1 < kInfinityBits - 1 ? 1.0f / (scale * before) : 0.0f;
  }
  GRADSTEP_HD bool exists() const { return factor != 0; }  // else all codes are zero
  GRADSTEP_HD bool is_plain() const { return exists() && before == 1; }
};

using Q8 = Minifloat<8, 3, true>;
using Q8Unsigned = Minifloat<8, 3, false>;
using Q4 = Minifloat<4, 1, true>;
using Q4Unsigned = Minifloat<4, 1, false>;

// ---- the lists ------------------------------------------------------------------------------------------------------------

// In the order of `Format`: formats of one number at a time, then those of blocks.
using Formats = List<Float32, Float64, Float16, BFloat16, Int16, Float16Unsigned>;
using Blocks = List<Q8, Q8Unsigned, Q4, Q4Unsigned>;

constexpr bool is_compressed(Format format) { return format >= Format::kQ8; }
constexpr bool is_half(Format format) { return format == Format::kFloat16 || format == Format::kBFloat16; }
constexpr int bits_of(Format format) {
  switch (format) {
    case Format::kFloat32:
      return 32;
    case Format::kFloat64:
      return 64;
    case Format::kQ8:
    case Format::kQ8Unsigned:
      return 8;
    case Format::kQ4:
    case Format::kQ4Unsigned:
      return 4;
    default:
      return 16;
  }
}
constexpr std::int64_t block_of(Format format) { return bits_of(format) == 8 ? 256 : 128; }

}  // namespace gradstep
