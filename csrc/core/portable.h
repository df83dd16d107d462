// Portability: the only file that knows which compiler and which processor family this is.
#pragma once

#include <cstdint>
#include <cstring>

#if (defined(__SSE2__) || defined(_M_X64)) && !defined(__CUDACC__)
#include <immintrin.h>
#define GRADSTEP_X86 1
#else
#define GRADSTEP_X86 0
#endif

// GRADSTEP_HD: a function of one element, for host and device, always inlined. The per-ISA objects rely on "always": a copy
// that is not inlined would be a weak symbol, and the linker would keep one instruction set's copy for all of them.
#if defined(__CUDACC__)
#define GRADSTEP_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER) && !defined(__clang__)
#define GRADSTEP_HD __forceinline
#else
#define GRADSTEP_HD __attribute__((always_inline)) inline
#endif

// GRADSTEP_DEVICE_TOO: a function for host and device that need not be inlined. It may not be called in the per-ISA objects.
#if defined(__CUDACC__)
#define GRADSTEP_DEVICE_TOO __host__ __device__ __forceinline__  // a call would spill registers
#else
#define GRADSTEP_DEVICE_TOO inline
#endif

// GRADSTEP_INLINE_LAMBDA: after the parameters of a lambda that is always inlined.
#if defined(_MSC_VER) && !defined(__clang__)
#define GRADSTEP_INLINE_LAMBDA [[msvc::forceinline]]
#else
#define GRADSTEP_INLINE_LAMBDA __attribute__((always_inline))
#endif

// GRADSTEP_INDEPENDENT: before a loop whose iterations do not depend on each other.
#if defined(__clang__)
#define GRADSTEP_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define GRADSTEP_INDEPENDENT _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define GRADSTEP_INDEPENDENT __pragma(loop(ivdep))
#else
#define GRADSTEP_INDEPENDENT
#endif

// GRADSTEP_UNROLL(n): before a loop in device code.
#if defined(__CUDACC__)
#define GRADSTEP_UNROLL(n) _Pragma(GRADSTEP_TEXT(unroll n))
#define GRADSTEP_TEXT(text) #text
#else
#define GRADSTEP_UNROLL(n)
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define GRADSTEP_NOINLINE __declspec(noinline)
#else
#define GRADSTEP_NOINLINE __attribute__((noinline))
#endif

namespace gradstep {

// Asks for the cache lines of `bytes` bytes from `at` on. A hint: any address will do.
template <int bytes>
GRADSTEP_HD void prefetch(const void* at) {
#if defined(__GNUC__)
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(at) + i);
#elif GRADSTEP_X86
  for (int i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(at) + i, _MM_HINT_T0);
#else
  (void)at;
#endif
}

// A register of doubles: compilers keep these in registers, which they do not do for an array of sums.
#if defined(__GNUC__) && !defined(__CUDACC__)
#if defined(__AVX512F__)
#define GRADSTEP_VECTOR_BYTES 64
#elif defined(__AVX__)
#define GRADSTEP_VECTOR_BYTES 32
#else
#define GRADSTEP_VECTOR_BYTES 16
#endif
inline constexpr int kVectorDoubles = GRADSTEP_VECTOR_BYTES / 8;
using Doubles = double __attribute__((vector_size(GRADSTEP_VECTOR_BYTES)));

// Elements from `at` on, each multiplied by `scale` in its own type.
GRADSTEP_HD Doubles load_doubles(const float* at, float scale) {
  float __attribute__((vector_size(GRADSTEP_VECTOR_BYTES / 2))) x;
  std::memcpy(&x, at, sizeof x);
  x *= scale;
#if defined(__AVX512F__)
  return reinterpret_cast<Doubles>(_mm512_maskz_cvtps_pd(0xff, reinterpret_cast<__m256>(x)));  // GCC 12 halves the general form
#else
  return __builtin_convertvector(x, Doubles);
#endif
}
GRADSTEP_HD Doubles load_doubles(const double* at, double scale) {
  Doubles x;
  std::memcpy(&x, at, sizeof x);
  return scale * x;
}

// sum + x x, for an x that was a float: the product is exact in double, so whether the two operations are fused makes no
// difference.
GRADSTEP_HD Doubles add_exact_square(Doubles sum, Doubles x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Doubles>(
      _mm512_fmadd_pd(reinterpret_cast<__m512d>(x), reinterpret_cast<__m512d>(x), reinterpret_cast<__m512d>(sum)));
#elif defined(__FMA__)
  return reinterpret_cast<Doubles>(
      _mm256_fmadd_pd(reinterpret_cast<__m256d>(x), reinterpret_cast<__m256d>(x), reinterpret_cast<__m256d>(sum)));
#else
  return sum + x * x;
#endif
}

// A register of words of 64 bits, of which the lower 32 count, and their products with one of 32 bits.
using Words = std::uint64_t __attribute__((vector_size(GRADSTEP_VECTOR_BYTES)));
using HalfWords = std::uint32_t __attribute__((vector_size(GRADSTEP_VECTOR_BYTES / 2)));
GRADSTEP_HD Words wide_product(Words a, std::uint32_t b) {
  const Words factor = Words{} + b;
#if defined(__AVX512F__)  // GCC 12 warns of its own header for the form without a mask
  return reinterpret_cast<Words>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(factor)));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(factor)));
#elif GRADSTEP_X86
  return reinterpret_cast<Words>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(factor)));
#else
  return (a & 0xffffffffu) * factor;
#endif
}
// 0, 1, 2, ...
GRADSTEP_HD Words count_words() {
#if GRADSTEP_VECTOR_BYTES == 64
  return Words{0, 1, 2, 3, 4, 5, 6, 7};
#elif GRADSTEP_VECTOR_BYTES == 32
  return Words{0, 1, 2, 3};
#else
  return Words{0, 1};
#endif
}
GRADSTEP_HD void store_words(Words words, std::uint32_t* to) {
  const HalfWords lower = __builtin_convertvector(words, HalfWords);
  std::memcpy(to, &lower, sizeof lower);
}
#else
using Words = std::uint64_t;
GRADSTEP_HD Words wide_product(Words a, std::uint32_t b) { return (a & 0xffffffffu) * b; }
GRADSTEP_HD Words count_words() { return 0; }
GRADSTEP_HD void store_words(Words words, std::uint32_t* to) { *to = static_cast<std::uint32_t>(words); }

inline constexpr int kVectorDoubles = 1;
using Doubles = double;

template <class T>
GRADSTEP_HD double load_doubles(const T* at, T scale) {
  return static_cast<double>(scale * *at);
}
GRADSTEP_HD double add_exact_square(double sum, double x) { return sum + x * x; }
#endif

#if !defined(__CUDACC__)
// The floating-point environment of a sweep: round to nearest, no traps, denormals flushed or kept. What the caller had is
// restored when the object goes out of scope.
class FloatEnvironment {
 public:
  explicit FloatEnvironment(bool flush_denormals) {
#if GRADSTEP_X86
    constexpr unsigned kAllMasked = 0x1f80, kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
    saved_ = _mm_getcsr();
    _mm_setcsr(kAllMasked | (flush_denormals ? kFlushToZero | kDenormalsAreZero : 0));
#elif defined(__aarch64__) && !defined(_MSC_VER)
    constexpr uint64_t kFlushToZero = uint64_t{1} << 24;
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(flush_denormals ? kFlushToZero : uint64_t{0}));
#else
    (void)flush_denormals;
#endif
  }
  ~FloatEnvironment() {
#if GRADSTEP_X86
    _mm_setcsr(saved_);
#elif defined(__aarch64__) && !defined(_MSC_VER)
    asm volatile("msr fpcr, %0" ::"r"(saved_));
#endif
  }
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
#if GRADSTEP_X86
  unsigned saved_;
#else
  uint64_t saved_ = 0;
#endif
};

// A hint to the processor that this thread is waiting.
inline void relax() {
#if GRADSTEP_X86
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  asm volatile("yield");
#endif
}

#endif

}  // namespace gradstep
