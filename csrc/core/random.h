// Random numbers that are a function of a counter: the same for any order of computing, any number of threads, CPU and GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "portable.h"

namespace gradstep {

// Philox4x32-10 (Salmon et al., SC 2011): four random words for each counter and key.
class Philox {
 public:
  std::uint32_t key[2];

  GRADSTEP_HD void operator()(std::uint32_t (&x)[4]) const {
    std::uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < kRounds; ++round) {
      const std::uint64_t a = std::uint64_t{kFactor0} * x[0], b = std::uint64_t{kFactor1} * x[2];
      const std::uint32_t x1 = x[1], x3 = x[3];
      x[0] = static_cast<std::uint32_t>(b >> 32) ^ x1 ^ k0;
      x[1] = static_cast<std::uint32_t>(b);
      x[2] = static_cast<std::uint32_t>(a >> 32) ^ x3 ^ k1;
      x[3] = static_cast<std::uint32_t>(a);
      k0 += kStep0;
      k1 += kStep1;
    }
  }

  // The same for a counter a lane.
  GRADSTEP_HD void operator()(Words (&x)[4]) const {
    std::uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < kRounds; ++round) {
      const Words a = wide_product(x[0], kFactor0), b = wide_product(x[2], kFactor1);
      x[0] = (b >> 32) ^ x[1] ^ std::uint64_t{k0};
      x[1] = b;
      x[2] = (a >> 32) ^ x[3] ^ std::uint64_t{k1};
      x[3] = a;
      k0 += kStep0;
      k1 += kStep1;
    }
  }

 private:
  static constexpr int kRounds = 10;
  static constexpr std::uint32_t kFactor0 = 0xD2511F53, kFactor1 = 0xCD9E8D57, kStep0 = 0x9E3779B9, kStep1 = 0xBB67AE85;
};

// Random words for rounding, 16 bits an element: a function of seed, stream, step and operand, and of the element's index. Made
// for 128 elements at a time, from 16 counters side by side.
struct Draws {
  static constexpr std::int64_t kGroup = 128, kCounters = 16;
  Philox philox;
  std::uint32_t operand, stream, step;

  // Those of one element.
  GRADSTEP_HD std::uint32_t at(std::uint64_t element) const {
    const std::uint64_t place = element % kGroup, word = place / kCounters;
    const std::uint64_t counter = kCounters * (element / kGroup) + place % kCounters;
    std::uint32_t x[4] = {static_cast<std::uint32_t>(counter),
                          static_cast<std::uint32_t>((counter >> 32) + (std::uint64_t{operand + 1} << 24)), stream, step};
    philox(x);
    return x[word % 4] >> (word < 4 ? 0 : 16) & 0xffffu;
  }

  // Those of the elements of group `group`, each in the lower half of a word.
  GRADSTEP_HD void operator()(std::uint64_t group, std::uint32_t* out) const {
    for (std::int64_t lane = 0; lane < kCounters; lane += kVectorDoubles) {
      const Words counter = count_words() + (kCounters * group + static_cast<std::uint64_t>(lane));
      const std::uint64_t above = static_cast<std::uint64_t>(operand + 1) << 24;
      Words x[4] = {counter, (counter >> 32) + above, Words{} + std::uint64_t{stream}, Words{} + std::uint64_t{step}};
      philox(x);
      for (int word = 0; word < 4; ++word) {
        store_words(x[word] & 0xffffu, out + kCounters * word + lane);
        store_words(x[word] >> 16 & 0xffffu, out + kCounters * (word + 4) + lane);
      }
    }
  }
};

// The natural logarithm of a normal positive number, by IEEE operations alone: the libraries' differ in the last bit.
GRADSTEP_HD double exact_steps_log(double x) {
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
  const double s = (m - 1) / (m + 1), z = s * s;
  double series = 1.0 / 23;
  for (int k = 21; k >= 1; k -= 2) series = series * z + 1.0 / k;
  return exponent * 0.6931471805599453 + 2 * s * series;
}

// The standard normal quantile of p in [1e-10, 1 - 1e-10]: algorithm AS 241, PPND16 (Wichura 1988), good to 16 digits.
GRADSTEP_HD double normal_quantile(double p) {
  const double q = p - 0.5;
  if (q >= -0.425 && q <= 0.425) {
    const double r = 0.180625 - q * q;
    return q *
           (((((((r * 2509.0809287301226727 + 33430.575583588128105) * r + 67265.770927008700853) * r + 45921.953931549871457) *
                   r +
               13731.693765509461125) *
                  r +
              1971.5909503065514427) *
                 r +
             133.14166789178437745) *
                r +
            3.387132872796366608) /
           (((((((r * 5226.495278852545925 + 28729.085735721942674) * r + 39307.89580009271061) * r + 21213.794301586595867) *
                   r +
               5394.1960214247511077) *
                  r +
              687.1870074920579083) *
                 r +
             42.313330701600911252) *
                r +
            1.0);
  }
  // The tail beyond r = 5 is for p under 1e-11, which no 32 random bits make.
  const double r = sqrt(-exact_steps_log(q < 0 ? p : 1 - p)) - 1.6;
  const double x = (((((((r * 7.7454501427834140764e-4 + 0.0227238449892691845833) * r + 0.24178072517745061177) * r +
                        1.27045825245236838258) *
                           r +
                       3.64784832476320460504) *
                          r +
                      5.7694972214606914055) *
                         r +
                     4.6303378461565452959) *
                        r +
                    1.42343711074968357734) /
                   (((((((r * 1.05075007164441684324e-9 + 5.475938084995344946e-4) * r + 0.0151986665636164571966) * r +
                        0.14810397642748007459) *
                           r +
                       0.68976733498510000455) *
                          r +
                      1.6763848301838038494) *
                         r +
                     2.05319162663775882187) *
                        r +
                    1.0);
  return q < 0 ? -x : x;
}

// Standard normal numbers of a tensor: a function of seed, stream and step, and of the element's index.
struct Normal {
  Philox philox;
  std::uint32_t stream, step;

  // The numbers of elements 4 `quad` to 4 `quad` + 3.
  GRADSTEP_HD void operator()(std::uint64_t quad, double (&z)[4]) const {
    std::uint32_t x[4] = {static_cast<std::uint32_t>(quad), static_cast<std::uint32_t>(quad >> 32), stream, step};
    philox(x);
    for (int i = 0; i < 4; ++i) z[i] = normal(x[i]);
  }

  // The number of one element.
  GRADSTEP_HD double at(std::uint64_t element) const {
    const std::uint64_t quad = element / 4;
    std::uint32_t x[4] = {static_cast<std::uint32_t>(quad), static_cast<std::uint32_t>(quad >> 32), stream, step};
    philox(x);
    return normal(x[element % 4]);
  }

 private:
  GRADSTEP_HD static double normal(std::uint32_t word) { return normal_quantile((word + 0.5) * (1.0 / 4294967296.0)); }
};

}  // namespace gradstep
