// All kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#define CXV_ISA avx2
#define CXV_TARGET "avx2,fma,f16c"
#define CXV_VECTOR_BYTES 32

#include "target.h"

const cxv::Kernels cxv::kAvx2Kernels = CXV_ISA::kKernels;
#endif
