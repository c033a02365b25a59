// All kernels for AVX512. The standard headers come before the target pragma, because the whole library shares their
// inline functions, which must run on every CPU.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#define CXV_ISA avx512
#define CXV_VECTOR_BYTES 64

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "all_kernels.h"

namespace cxv {
const Kernels kAvx512Kernels = CXV_ISA::kKernels;
}  // namespace cxv

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
