// What each instruction set's build (isa_*.cpp) exports: every kernel, in one table.
#pragma once

#include "../include/dropout.h"
#include "../include/conv_norm.h"
#include "../include/linear_attention.h"
#include "../include/nystrom_attention.h"
#include "isa.h"

namespace cxv {

struct Kernels {
  LinearAttentionKernels linear_attention;
  DropoutKernels dropout;
  ConvNormKernels conv_norm;
  NystromAttentionKernels nystrom_attention;
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// Those of the widest instruction set that this machine runs.
inline const Kernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::kAvx512:
      return kAvx512Kernels;
    case Isa::kAvx2:
      return kAvx2Kernels;
    case Isa::kBaseline:
      break;
  }
#endif
  return kBaselineKernels;
}

}  // namespace cxv
