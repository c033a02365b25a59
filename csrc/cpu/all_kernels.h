// Every kernel for one instruction set: included by isa_*.cpp alone.
#pragma once

#include "dropout_kernel.h"
#include "conv_norm_kernel.h"
#include "kernels.h"
#include "linear_attention_kernel.h"
#include "nystrom_attention_kernel.h"

namespace cxv {
namespace CXV_ISA {

inline constexpr Kernels kKernels = {
    .linear_attention = kLinearAttention,
    .dropout = kDropout,
    .conv_norm = kConvNorm,
    .nystrom_attention = kNystromAttention,
};

}  // namespace CXV_ISA
}  // namespace cxv
