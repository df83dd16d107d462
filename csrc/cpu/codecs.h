// Loading and storing: operands decoded into a tile and encoded from it. Included by kernels.cpp alone, once per instruction
// set: all of it has internal linkage.
#pragma once

#include "../core/precision.h"
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

// The codes of one block.
template <class Format, bool kByChance, bool kLarge, class T>
GRADSTEP_HD void store_codes(std::int64_t size, const T* in, const BlockInverse inverse, const std::uint32_t* draws,
                             std::uint8_t* out) {
  const auto code = [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA {
    const std::uint32_t bits = bits_of(static_cast<float>(in[i]));
    const float x = float_of(bits & ~kSignBit), y = (kLarge ? x * inverse.before : x) * inverse.factor;
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
  auto* codes = reinterpret_cast<std::uint8_t*>(part.operand.data) + part.begin / kPerByte;
  // All scales first: a search for the largest ends in a chain of instructions that wait for each other, and those of several
  // blocks overlap.
  for_blocks<Format>(part, [&](std::int64_t first, std::int64_t length, float& scale)
                               GRADSTEP_INLINE_LAMBDA { scale = block_scale(largest_bits(length, in + first)); });
  for_blocks<Format>(part, [&](std::int64_t first, std::int64_t length, float& scale) GRADSTEP_INLINE_LAMBDA {
    const T* from = in + first;
    std::uint8_t* to = codes + first / kPerByte;
    const std::uint32_t* draws = kByChance ? part.draws + first : nullptr;
    const BlockInverse inverse(scale);
    if (inverse.is_plain()) {
      store_codes<Format, kByChance, false>(length, from, inverse, draws, to);
    } else if (inverse.exists()) {
      store_codes<Format, kByChance, true>(length, from, inverse, draws, to);
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

// p <- the number that p, as it is stored, and the rest stand for.
template <class T>
void join(Precision precision, Format half, std::int64_t size, T* p, const T* rest) {
  visit_precision(precision, half, [=]<Precision kPrecision, class Half>() GRADSTEP_INLINE_LAMBDA {
    const auto element = [=](std::int64_t i) GRADSTEP_INLINE_LAMBDA { p[i] = joined<kPrecision, Half>(p[i], rest[i]); };
    for_each(size, Ahead{0}, element, p);
  });
}

// stored <- what p becomes in its 16 bits; rest <- what is kept beside.
template <class T>
void part(Precision precision, Format half, std::int64_t size, const T* p, T* stored, T* rest) {
  visit_precision(precision, half, [=]<Precision kPrecision, class Half>() GRADSTEP_INLINE_LAMBDA {
    const auto element = [=](std::int64_t i)
                             GRADSTEP_INLINE_LAMBDA { part_in_two<kPrecision, Half>(p[i], stored[i], rest[i]); };
    for_each(size, Ahead{0}, element, stored);
  });
}

}  // namespace
}  // namespace gradstep::cpu
