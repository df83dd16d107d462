// Loading and storing: operands decoded into a tile and encoded from it. Included by kernels.cpp alone, once per instruction
// set: all of it has internal linkage.
#pragma once

#include "loops.h"

namespace gradstep::cpu {
namespace {

// Elements [begin, begin + size) of an operand.
struct Part {
  const Sweep& sweep;
  const Operand& operand;
  std::int64_t begin, size;
  std::int64_t ahead = 0;                // how many elements ahead memory is asked for it
  const std::uint32_t* draws = nullptr;  // 16 random bits an element, where it is rounded by chance
};

// ---- one number at a time -------------------------------------------------------------------------------------------------

// A loop over elements that are contiguous at `at`, in blocks, each of which asks for memory ahead.
template <class Stored, class Element>
GRADSTEP_HD void for_each_stored(const Part& part, const Stored* at, Element element) {
  constexpr std::int64_t kBlock = 64;
  std::int64_t i = 0;
  for (; i + kBlock <= part.size; i += kBlock) {
    if (part.ahead) prefetch<kBlock * sizeof(Stored)>(at + i + part.ahead);
    GRADSTEP_INDEPENDENT
    for (std::int64_t j = 0; j < kBlock; ++j) element(i + j);
  }
  GRADSTEP_INDEPENDENT
  for (std::int64_t j = i; j < part.size; ++j) element(j);
}

// Calls row(offset in bytes, index in the tile, length) for each innermost row of the elements.
template <class Row>
GRADSTEP_HD void for_rows(const Part& part, Row row) {
  const Sweep& sweep = part.sweep;
  const std::int64_t* strides = part.operand.strides;
  const int last = sweep.ndim - 1;
  std::int64_t at[kMaxDims], offset = 0, rest = part.begin;
  for (int d = last; d >= 0; --d) {
    at[d] = rest % sweep.shape[d];
    rest /= sweep.shape[d];
    offset += at[d] * strides[d];
  }
  for (std::int64_t done = 0; done < part.size;) {
    const std::int64_t left = sweep.shape[last] - at[last], length = left < part.size - done ? left : part.size - done;
    row(offset, done, length);
    done += length;
    offset -= at[last] * strides[last];
    at[last] = 0;
    for (int d = last - 1; d >= 0; --d) {
      offset += strides[d];
      if (++at[d] < sweep.shape[d]) break;
      offset -= at[d] * strides[d];
      at[d] = 0;
    }
  }
}

template <class Format, class T>
void load(const Part& part, T* out) {
  using Stored = typename Format::Stored;
  const Operand& operand = part.operand;
  if (!operand.strides) {
    const auto* in = reinterpret_cast<const Stored*>(operand.data) + part.begin;
    const auto element = [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA { out[i] = Format::template decode<T>(in[i]); };
    return for_each_stored(part, in, element);
  }
  const std::int64_t stride = operand.strides[part.sweep.ndim - 1];
  for_rows(part, [&](std::int64_t offset, std::int64_t first, std::int64_t length) {
    const std::byte* in = operand.data + offset;
    for (std::int64_t i = 0; i < length; ++i) {
      out[first + i] = Format::template decode<T>(*reinterpret_cast<const Stored*>(in + i * stride));
    }
  });
}

template <class Format, class T, bool kByChance>
GRADSTEP_HD void store_as(const Part& part, const T* in) {
  using Stored = typename Format::Stored;
  const Operand& operand = part.operand;
  const std::uint32_t* draws = part.draws;
  const auto encoded = [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA {
    if constexpr (kByChance) return Format::encode_by_chance(static_cast<float>(in[i]), draws[i]);
    else return Format::encode(in[i]);
  };
  if (!operand.strides) {
    auto* out = reinterpret_cast<Stored*>(operand.data) + part.begin;
    return for_each_stored(part, out, [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA { out[i] = encoded(i); });
  }
  const std::int64_t stride = operand.strides[part.sweep.ndim - 1];
  for_rows(part, [&](std::int64_t offset, std::int64_t first, std::int64_t length) {
    std::byte* out = operand.data + offset;
    for (std::int64_t i = 0; i < length; ++i) *reinterpret_cast<Stored*>(out + i * stride) = encoded(first + i);
  });
}

template <class Format, class T>
void store(const Part& part, const T* in) {
  if constexpr (requires { Format::encode_by_chance(0.0f, 0u); }) {
    if (part.draws) return store_as<Format, T, true>(part, in);
  }
  store_as<Format, T, false>(part, in);
}

// ---- blocks ---------------------------------------------------------------------------------------------------------------

// Calls block(first element in the tile, its length, its scale) for each block. Tiles begin with a block.
template <class Format, class Block>
GRADSTEP_HD void for_blocks(const Part& part, Block block) {
  float* scale = part.operand.scales + part.begin / Format::block;
  for (std::int64_t i = 0; i < part.size; i += Format::block) {
    block(i, part.size - i < Format::block ? part.size - i : Format::block, *scale++);
  }
}

template <class Format, class T>
void load_blocks(const Part& part, T* out) {
  constexpr std::int64_t kPerByte = 8 / Format::bits;
  const auto* codes = reinterpret_cast<const std::uint8_t*>(part.operand.data) + part.begin / kPerByte;
  for_blocks<Format>(part, [&](std::int64_t first, std::int64_t length, const float scale) GRADSTEP_INLINE_LAMBDA {
    const std::uint8_t* in = codes + first / kPerByte;
    T* to = out + first;
    if (part.ahead) prefetch<Format::block / kPerByte>(in + part.ahead / kPerByte);
    if constexpr (kPerByte == 1) {
      GRADSTEP_INDEPENDENT
      for (std::int64_t i = 0; i < length; ++i) to[i] = T(Format::decode(in[i]) * scale);
    } else {
      GRADSTEP_INDEPENDENT
      for (std::int64_t i = 0; i < length / 2; ++i) {
        to[2 * i] = T(Format::decode(in[i] & 15u) * scale);
        to[2 * i + 1] = T(Format::decode(in[i] >> 4) * scale);
      }
      if (length % 2) to[length - 1] = T(Format::decode(in[length / 2] & 15u) * scale);
    }
  });
}

// The largest magnitude, as bits: NaN is larger than anything.
template <class T>
GRADSTEP_HD std::uint32_t largest_bits(std::int64_t size, const T* x) {
  std::int32_t largest = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    const auto bits = static_cast<std::int32_t>(bits_of(static_cast<float>(x[i])) & ~kSignBit);
    largest = bits > largest ? bits : largest;
  }
  return static_cast<std::uint32_t>(largest);
}

// The codes of one block, of numbers that are multiplied by `before` and then by `inverse`.
template <class Format, bool kByChance, bool kLarge, class T>
GRADSTEP_HD void store_codes(std::int64_t size, const T* in, float before, float inverse, const std::uint32_t* draws,
                             std::uint8_t* out) {
  const auto code = [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA {
    const std::uint32_t bits = bits_of(static_cast<float>(in[i]));
    const float x = float_of(bits & ~kSignBit), y = (kLarge ? x * before : x) * inverse;
    return Format::template encode<kByChance>(y, bits & kSignBit, kByChance ? draws[i] : 0);
  };
  if constexpr (Format::bits == 8) {
    GRADSTEP_INDEPENDENT
    for (std::int64_t i = 0; i < size; ++i) out[i] = static_cast<std::uint8_t>(code(i));
  } else {
    GRADSTEP_INDEPENDENT
    for (std::int64_t i = 0; i < size / 2; ++i) out[i] = static_cast<std::uint8_t>(code(2 * i) | code(2 * i + 1) << 4);
    if (size % 2) out[size / 2] = static_cast<std::uint8_t>(code(size - 1));
  }
}

template <class Format, class T, bool kByChance>
GRADSTEP_HD void store_blocks_as(const Part& part, const T* in) {
  constexpr std::int64_t kPerByte = 8 / Format::bits;
  constexpr std::uint32_t kLeastNormal = 0x00800000u, kLarge = 252u << 23;  // 2^-126, 2^125
  auto* codes = reinterpret_cast<std::uint8_t*>(part.operand.data) + part.begin / kPerByte;
  // All scales first: a search for the largest ends in a chain of instructions that wait for each other, and those of several
  // blocks overlap.
  for_blocks<Format>(part, [&](std::int64_t first, std::int64_t length, float& scale) GRADSTEP_INLINE_LAMBDA {
    const std::uint32_t largest = largest_bits(length, in + first);
    scale = float_of(largest < kLeastNormal ? 0 : largest < kInfinityBits ? largest : kInfinityBits | 0x400000u);
  });
  for_blocks<Format>(part, [&](std::int64_t first, std::int64_t length, float& scale) GRADSTEP_INLINE_LAMBDA {
    const T* from = in + first;
    std::uint8_t* to = codes + first / kPerByte;
    const std::uint32_t* draws = kByChance ? part.draws + first : nullptr;
    const std::uint32_t largest = bits_of(scale);
    if (largest - 1 < kLarge - 1) {
      store_codes<Format, kByChance, false>(length, from, 1.0f, 1.0f / scale, draws, to);
    } else if (largest != 0 && largest < kInfinityBits) {  // the inverse would be subnormal
      store_codes<Format, kByChance, true>(length, from, 0x1p-4f, 1.0f / (scale * 0x1p-4f), draws, to);
    } else {
      std::memset(to, 0, static_cast<std::size_t>((length + kPerByte - 1) / kPerByte));
    }
  });
}

template <class Format, class T>
void store_blocks(const Part& part, const T* in) {
  if (part.draws) return store_blocks_as<Format, T, true>(part, in);
  store_blocks_as<Format, T, false>(part, in);
}

// ---- the table ------------------------------------------------------------------------------------------------------------

template <class T>
struct Codec {
  void (*load)(const Part&, T*);
  void (*store)(const Part&, const T*);
};

template <class T, class... F, class... B>
const Codec<T>& codec(Format format, List<F...>, List<B...>) {
  static constexpr Codec<T> kCodecs[] = {{load<F, T>, store<F, T>}..., {load_blocks<B, T>, store_blocks<B, T>}...};
  return kCodecs[static_cast<int>(format)];
}

template <class T>
void load_part(const Part& part, T* out) {
  codec<T>(part.operand.format, Formats{}, Blocks{}).load(part, out);
}

template <class T>
void store_part(const Part& part, const T* in) {
  codec<T>(part.operand.format, Formats{}, Blocks{}).store(part, in);
}

// ---- parameters in two ----------------------------------------------------------------------------------------------------

template <class T>
GRADSTEP_HD float rounded_to(Format half, T x) {
  return half == Format::kFloat16 ? Float16::decode<float>(Float16::encode(x)) : BFloat16::decode<float>(BFloat16::encode(x));
}

// The largest rest that a number of 16 bits can leave: half a unit in its last place.
GRADSTEP_HD float largest_rest(Format half, float p) {
  const float binade = float_of(bits_of(p) & kInfinityBits);
  if (half == Format::kBFloat16) return binade * 0x1p-8f;
  return binade * 0x1p-11f > 0x1p-25f ? binade * 0x1p-11f : 0x1p-25f;
}

// p <- the number that p, as it is stored, and the rest stand for. A rest that is none of this p is left out: somebody has
// written to p.
template <class T>
void join(Precision precision, Format half, std::int64_t size, T* p, const T* rest) {
  const auto each = [=](auto element) GRADSTEP_INLINE_LAMBDA { for_each(size, Ahead{0}, element, p); };
  const auto by_format = [=](auto of_format) GRADSTEP_INLINE_LAMBDA {
    half == Format::kFloat16 ? of_format(Format::kFloat16) : of_format(Format::kBFloat16);
  };
  if (precision == Precision::kKahan) {
    by_format([=](Format format) GRADSTEP_INLINE_LAMBDA {
      each([=](std::int64_t i) GRADSTEP_INLINE_LAMBDA {
        p[i] += magnitude(rest[i]) <= T(largest_rest(format, static_cast<float>(p[i]))) ? rest[i] : T(0);
      });
    });
  } else if (precision == Precision::kSplit) {
    each([=](std::int64_t i) GRADSTEP_INLINE_LAMBDA {
      const auto upper = static_cast<float>(p[i]);
      const float whole = float_of(bits_of(upper) + static_cast<std::uint32_t>(static_cast<std::int32_t>(rest[i])));
      p[i] = T(bits_of(BFloat16::upper_half(whole)) == bits_of(upper) ? whole : upper);
    });
  } else {
    by_format([=](Format format) GRADSTEP_INLINE_LAMBDA {
      each([=](std::int64_t i) GRADSTEP_INLINE_LAMBDA { p[i] = T(rounded_to(format, rest[i])) == p[i] ? rest[i] : p[i]; });
    });
  }
}

// stored <- what p becomes in its 16 bits; rest <- what is kept beside.
template <class T>
void part_in_two(Precision precision, Format half, std::int64_t size, const T* p, T* stored, T* rest) {
  const auto each = [=](auto element) GRADSTEP_INLINE_LAMBDA { for_each(size, Ahead{0}, element, stored); };
  if (precision == Precision::kSplit) {
    each([=](std::int64_t i) GRADSTEP_INLINE_LAMBDA {
      const auto number = static_cast<float>(p[i]);
      const float upper = BFloat16::upper_half(number);
      stored[i] = T(upper);
      const auto lower = static_cast<std::int32_t>(bits_of(number) - bits_of(upper));
      rest[i] = number == number ? T(lower) : T(0);
    });
  } else if (precision == Precision::kMaster) {
    each([=](std::int64_t i) GRADSTEP_INLINE_LAMBDA { stored[i] = rest[i] = T(static_cast<float>(p[i])); });
  } else {
    const auto kahan = [=](Format format) GRADSTEP_INLINE_LAMBDA {
      each([=](std::int64_t i) GRADSTEP_INLINE_LAMBDA {
        stored[i] = T(rounded_to(format, p[i]));
        const T left = p[i] - stored[i];
        rest[i] = left - left == T(0) ? left : T(0);  // nothing beside an infinity
      });
    };
    half == Format::kFloat16 ? kahan(Format::kFloat16) : kahan(Format::kBFloat16);
  }
}

}  // namespace
}  // namespace gradstep::cpu
