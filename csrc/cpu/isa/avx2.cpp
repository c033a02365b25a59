// All kernels for AVX2 with FMA and F16C. The standard headers come before the target pragma, because the whole library
// shares their inline functions, which must run on every CPU.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#define CXV_ISA avx2
#define CXV_VECTOR_BYTES 32

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "all_kernels.h"

namespace cxv {
const Kernels kAvx2Kernels = CXV_ISA::kKernels;
}  // namespace cxv

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
