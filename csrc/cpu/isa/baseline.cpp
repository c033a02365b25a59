// All kernels for the instruction set that the compiler targets by default (SSE2, NEON, …).
#define CXV_ISA baseline
#define CXV_VECTOR_BYTES 16

#include "all_kernels.h"

const cxv::Kernels cxv::kBaselineKernels = CXV_ISA::kKernels;
