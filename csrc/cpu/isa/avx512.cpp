// All kernels for AVX512.
#if defined(__x86_64__)
#define CXV_ISA avx512
#define CXV_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define CXV_VECTOR_BYTES 64

#include "target.h"

const cxv::Kernels cxv::kAvx512Kernels = CXV_ISA::kKernels;
#endif
