// The instruction sets that the CPU kernels are compiled for, and the one that this machine runs.
#pragma once

#include <cstdlib>
#include <cstring>

namespace cxv {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The widest set that the CPU has; CXV_CPU_ISA=baseline|avx2 in the environment (read once) lowers it, for tests.
inline Isa cpu_isa() {
#if defined(__x86_64__)
  static const Isa isa = [] {
    const char* wanted = std::getenv("CXV_CPU_ISA");
    const auto allows = [&](const char* name) { return wanted == nullptr || std::strcmp(wanted, name) == 0; };
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && allows("avx512")) return Isa::kAvx512;
    if (avx2 && (allows("avx2") || allows("avx512"))) return Isa::kAvx2;
    return Isa::kBaseline;
  }();
  return isa;
#else
  return Isa::kBaseline;
#endif
}

}  // namespace cxv
