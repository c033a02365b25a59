// Elements of every dtype, and the numbers that kernels compute with.
#pragma once

#include <cuda_fp16.h>

namespace cxv {
namespace cuda {

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float* p) { *p = x; }
__device__ inline void narrow(float x, __half* p) { *p = __float2half_rn(x); }

}  // namespace cuda
}  // namespace cxv
