// Powers in double, by IEEE operations alone: the libraries' differ in the last bit, and a GPU's from all of them. Numbers are
// carried as sums of two doubles (Dekker 1971), about 32 digits, so that the result is rounded once, or as good as once.
#pragma once

#include <cstdint>
#include <cstring>

#include "portable.h"

namespace gradstep {

// high + low, where |low| is at most half a unit in the last place of `high`.
struct TwoDoubles {
  double high, low = 0;
};

inline constexpr TwoDoubles kLog2{0.6931471805599453, 2.3190468138462996e-17};

// The sum of two doubles, of which the first is the larger.
GRADSTEP_HD TwoDoubles quick_sum(double a, double b) {
  const double sum = a + b;
  return {sum, b - (sum - a)};
}

GRADSTEP_HD TwoDoubles exact_sum(double a, double b) {
  const double sum = a + b, of_b = sum - a;
  return {sum, (a - (sum - of_b)) + (b - of_b)};
}

// The same of both ways to find it: the error of a product is a double.
GRADSTEP_HD TwoDoubles exact_product(double a, double b) {
  const double product = a * b;
#if defined(__CUDA_ARCH__)
  return {product, __fma_rn(a, b, -product)};
#else
  constexpr double kSplitter = 134217729;  // 2^27 + 1
  const double ca = kSplitter * a, cb = kSplitter * b;
  const double a_high = ca - (ca - a), a_low = a - a_high, b_high = cb - (cb - b), b_low = b - b_high;
  return {product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low};
#endif
}

GRADSTEP_HD TwoDoubles operator+(TwoDoubles a, TwoDoubles b) {
  const TwoDoubles sum = exact_sum(a.high, b.high);
  return quick_sum(sum.high, sum.low + (a.low + b.low));
}

GRADSTEP_HD TwoDoubles operator*(TwoDoubles a, TwoDoubles b) {
  const TwoDoubles product = exact_product(a.high, b.high);
  return quick_sum(product.high, product.low + (a.high * b.low + a.low * b.high));
}

GRADSTEP_HD TwoDoubles operator/(TwoDoubles a, TwoDoubles b) {
  const double first = a.high / b.high;
  const TwoDoubles rest = a + TwoDoubles{-first} * b;
  const double second = rest.high / b.high;
  const TwoDoubles left = rest + TwoDoubles{-second} * b;
  return quick_sum(first, second) + TwoDoubles{left.high / b.high};
}

// x^n of 0 <= x < 1 and a whole n >= 0, or an infinite one.
GRADSTEP_DEVICE_TOO double power(double x, double n) {
  if (x == 0 || n > 9e15) return n == 0 ? 1 : 0;
  TwoDoubles result{1}, square{x};
  for (auto left = static_cast<std::uint64_t>(n);;) {
    if (left & 1) result = result * square;
    left >>= 1;
    if (left == 0 || square.high < 1e-200) return left == 0 ? result.high : 0;
    square = square * square;
  }
}

// The natural logarithm of a normal positive number: log(m 2^e) = e log(2) + 2 artanh((m - 1) / (m + 1)).
GRADSTEP_DEVICE_TOO TwoDoubles logarithm(double x) {
  std::uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  auto exponent = static_cast<int>(bits >> 52) - 1023;
  bits = (bits & 0xFFFFFFFFFFFFFu) | 0x3FF0000000000000u;
  double m;
  std::memcpy(&m, &bits, sizeof m);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    ++exponent;
  }
  const TwoDoubles s = exact_sum(m, -1) / exact_sum(m, 1), z = s * s;
  TwoDoubles series = TwoDoubles{1} / TwoDoubles{45};
  for (int k = 43; k >= 1; k -= 2) series = series * z + TwoDoubles{1} / TwoDoubles{static_cast<double>(k)};
  return TwoDoubles{static_cast<double>(exponent)} * kLog2 + TwoDoubles{2} * s * series;
}

// x^y of x >= 1 and y >= 0: 2^n exp(r), where y log(x) = n log(2) + r.
GRADSTEP_DEVICE_TOO double real_power(double x, double y) {
  const TwoDoubles exponent = TwoDoubles{y} * logarithm(x);
  if (!(exponent.high < 700)) return exponent.high * 1e308;  // infinity; NaN of NaN
  const auto n = static_cast<std::int64_t>(exponent.high * 1.4426950408889634 + 0.5);
  const TwoDoubles r = exponent + TwoDoubles{static_cast<double>(-n)} * kLog2;
  TwoDoubles series{1};
  for (int k = 28; k >= 1; --k) series = TwoDoubles{1} + series * r / TwoDoubles{static_cast<double>(k)};
  const auto bits = static_cast<std::uint64_t>(n + 1023) << 52;
  double scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return series.high * scale;
}

}  // namespace gradstep
