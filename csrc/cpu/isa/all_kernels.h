// All kernels for one instruction set. Only the .cpp files in this folder include this header.
#pragma once

#include "../conv_norm.h"
#include "../dropout.h"
#include "../linear_attention.h"
#include "../nystrom_attention.h"
#include "../nystrom_residual.h"
#include "kernels.h"

#define CXV_STRING_(x) #x
#define CXV_STRING(x) CXV_STRING_(x)
#define CXV_PASS(Class, name, Params)                                            \
  .name = [](const Params& p, int64_t begin, int64_t end) {                      \
    for_dtype(p.dtype, [&](auto x) { Class<decltype(x)>{p}.name(begin, end); }); \
  },

namespace cxv::CXV_ISA {

inline constexpr Kernels kKernels = {.isa = CXV_STRING(CXV_ISA), CXV_PASSES(CXV_PASS)};

}  // namespace cxv::CXV_ISA
