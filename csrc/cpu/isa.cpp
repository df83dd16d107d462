#include "isa.h"

#include <atomic>

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif

namespace gradstep::cpu {

const Kernels& kernels_baseline();
#if GRADSTEP_HAS_X86_LEVELS
const Kernels& kernels_v3();
const Kernels& kernels_v4();
#endif

namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  const Kernels& (*kernels)();
};

#if GRADSTEP_HAS_X86_LEVELS
#if defined(_MSC_VER) && !defined(__clang__)
bool supports(int bit_of_ebx7, unsigned long long xcr0) {
  int regs[4];
  __cpuid(regs, 1);
  if (!(regs[2] >> 27 & 1) || (_xgetbv(0) & xcr0) != xcr0) return false;
  __cpuidex(regs, 7, 0);
  return regs[1] >> bit_of_ebx7 & 1;
}
bool supports_v3() { return supports(5, 0x6); }
bool supports_v4() {
  return supports_v3() && supports(16, 0xe6) && supports(17, 0xe6) && supports(30, 0xe6) && supports(31, 0xe6);
}
#else
bool supports_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
bool supports_v4() {
  return supports_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
#endif

constexpr Isa kIsas[] = {
    {"baseline", [] { return true; }, kernels_baseline},
#if GRADSTEP_HAS_X86_LEVELS
    {"x86-64-v3", supports_v3, kernels_v3},
    {"x86-64-v4", supports_v4, kernels_v4},
#endif
};

const Isa* widest() {
  const Isa* best = kIsas;
  for (const Isa& isa : kIsas) {
    if (isa.supported()) best = &isa;
  }
  return best;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{widest()};
  return isa;
}

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.supported()) names.emplace_back(isa.name);
  }
  return names;
}

std::string_view isa() { return current().load()->name; }

bool set_isa(std::string_view name) {
  for (const Isa& isa : kIsas) {
    if (isa.name != name || !isa.supported()) continue;
    current().store(&isa);
    return true;
  }
  return false;
}

const Kernels& kernels() { return current().load()->kernels(); }

}  // namespace gradstep::cpu
