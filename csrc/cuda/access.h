// How the programs of the GPU's engine read and write operands.
#pragma once

#include "../core/precision.h"
#include "../core/random.h"
#include "settle.h"

namespace gradstep::cuda {

// float32 is flushed by the instructions themselves; for float64 a GPU has none that do, so numbers are flushed on their way in
// and out.
template <class T>
GRADSTEP_HD T flushed(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(double)) return fabs(x) < 0x1p-1022 ? copysign(0.0, x) : x;
#endif
  return x;
}

// Calls call.operator()<F>() for the format of one number at a time.
template <class Call, class... F>
GRADSTEP_HD void visit_format(Format format, Call call, List<F...>) {
  int at = 0;
  ((at++ == static_cast<int>(format) ? call.template operator()<F>() : void()), ...);
}
template <class Call>
GRADSTEP_HD void visit_format(Format format, Call call) {
  visit_format(format, call, Formats{});
}
// The same for a format in blocks.
template <class Call>
GRADSTEP_HD void visit_blocks(Format format, Call call) {
  visit_format(static_cast<Format>(static_cast<int>(format) - Formats::size), call, Blocks{});
}

// Where element `i` of an operand stands. Division by division: strided operands are rare.
GRADSTEP_HD std::byte* element_of(const Sweep& sweep, const Operand& operand, std::int64_t i, int bytes) {
  if (!operand.strides) return operand.data + i * bytes;
  std::int64_t offset = 0;
  for (int d = sweep.ndim - 1; d >= 0; --d) {
    offset += i % sweep.shape[d] * operand.strides[d];
    i /= sweep.shape[d];
  }
  return operand.data + offset;
}

// A few elements side by side, in one access where they are aligned.
template <class X, int kWidth>
struct alignas(sizeof(X) * kWidth <= 16 ? sizeof(X) * kWidth : 16) Few {
  X at[kWidth];
};

// Elements of an operand as they are stored, in `Bits` each: read first, and decoded when all operands are on their way.
template <int kWidth, class Bits>
struct Raw {
  Bits bits[kWidth];

  template <class X>
  GRADSTEP_HD void read(const std::byte* at) {
    const auto few = *reinterpret_cast<const Few<X, kWidth>*>(at);
    GRADSTEP_UNROLL() for (int k = 0; k < kWidth; ++k) bits[k] = few.at[k];
  }
  template <class X>
  GRADSTEP_HD void write(std::byte* at) const {
    Few<X, kWidth> few;
    GRADSTEP_UNROLL() for (int k = 0; k < kWidth; ++k) few.at[k] = static_cast<X>(bits[k]);
    *reinterpret_cast<Few<X, kWidth>*>(at) = few;
  }
  // Elements [i, i + kWidth) of what stands at `data`, of `size` bits each.
  GRADSTEP_HD void read(const std::byte* data, std::int64_t i, int size) {
    if (size == 16) return read<std::uint16_t>(data + i * 2);
    if constexpr (sizeof(Bits) == 8) {
      if (size == 64) return read<std::uint64_t>(data + i * 8);
    }
    read<std::uint32_t>(data + i * 4);
  }
  GRADSTEP_HD void write(std::byte* data, std::int64_t i, int size) const {
    if (size == 16) return write<std::uint16_t>(data + i * 2);
    if constexpr (sizeof(Bits) == 8) {
      if (size == 64) return write<std::uint64_t>(data + i * 8);
    }
    write<std::uint32_t>(data + i * 4);
  }

  // Number by number, and without a lambda: what is filled through a reference in one of several branches stands in memory.
  template <class T>
  GRADSTEP_HD void decode(Format format, T (&x)[kWidth]) const {
    GRADSTEP_UNROLL() for (int k = 0; k < kWidth; ++k) x[k] = flushed(decoded<T>(format, bits[k], Formats{}));
  }
  template <class T>
  GRADSTEP_HD void encode(Format format, const T (&x)[kWidth]) {
    GRADSTEP_UNROLL() for (int k = 0; k < kWidth; ++k) bits[k] = encoded(format, flushed(x[k]), Formats{});
  }

 private:
  template <class T, class... F>
  GRADSTEP_HD static T decoded(Format format, Bits bits, List<F...>) {
    T x = T(0);
    int at = 0;
    ((x = at++ == static_cast<int>(format) ? decoded_as<F, T>(bits) : x), ...);
    return x;
  }
  template <class T, class... F>
  GRADSTEP_HD static Bits encoded(Format format, T x, List<F...>) {
    Bits bits = 0;
    int at = 0;
    ((bits = at++ == static_cast<int>(format) ? encoded_as<F>(x) : bits), ...);
    return bits;
  }
  template <class F, class T>
  GRADSTEP_HD static T decoded_as(Bits bits) {
    if constexpr (sizeof(typename F::Stored) <= sizeof(Bits)) return F::template decode<T>(stored<F>(bits));
    else return T(0);
  }
  template <class F, class T>
  GRADSTEP_HD static Bits encoded_as(T x) {
    if constexpr (sizeof(typename F::Stored) <= sizeof(Bits)) return bits_of(F::encode(x));
    else return 0;
  }
  template <class F>
  GRADSTEP_HD static typename F::Stored stored(Bits bits) {
    if constexpr (sizeof(typename F::Stored) == 8) return std::bit_cast<double>(bits);
    else if constexpr (sizeof(typename F::Stored) == 4) return float_of(static_cast<std::uint32_t>(bits));
    else return static_cast<typename F::Stored>(bits);
  }
  GRADSTEP_HD static Bits bits_of(double x) { return static_cast<Bits>(std::bit_cast<std::uint64_t>(x)); }
  GRADSTEP_HD static Bits bits_of(float x) { return gradstep::bits_of(x); }
  GRADSTEP_HD static Bits bits_of(std::uint16_t x) { return x; }
  GRADSTEP_HD static Bits bits_of(std::int16_t x) { return static_cast<std::uint16_t>(x); }
};

// The operators of an operation of this rule. Which decay there is, and whether this is the first step, is asked at each
// element: that costs nothing beside memory, and the rule is compiled once.
template <class Rule, class T>
class RuleOperators {
 public:
  GRADSTEP_HD RuleOperators(const Operation& operation, const std::byte* constants)
      : both_(*reinterpret_cast<const Both*>(constants)), decay_(operation.decay), first_(operation.first) {}

  GRADSTEP_HD T gradient(T g, T p, T factor) const {
    return decay_ == Decay::kCoupled ? both_.decay.coupled.gradient(g, p, factor) : g;
  }
  GRADSTEP_HD T total(T update, T p) const {
    return decay_ == Decay::kDecoupled ? both_.decay.decoupled.total(update, p) : update;
  }
  template <class... States>
  GRADSTEP_HD T update(T p, T g, States&... states) const {
    if constexpr (HasFirst<Rule>) {
      if (first_) return typename Rule::template First<T>(both_.update)(p, g, states...);
    }
    return both_.update(p, g, states...);
  }

 private:
  // As pipelines have them: see Decayed.
  union DecayOp {
    typename CoupledDecay::template Op<T> coupled;
    typename DecoupledDecay::template Op<T> decoupled;
  };
  using Both = Decayed<typename Rule::template Update<T>, DecayOp>;
  static_assert(sizeof(DecayOp) == sizeof(T));

  const Both both_;
  const Decay decay_;
  const bool first_;
};

template <class Constants>
GRADSTEP_HD Constants constants_of(const std::byte* constants) {
  return *reinterpret_cast<const Constants*>(constants);
}

}  // namespace gradstep::cuda
