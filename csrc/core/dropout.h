// What a dropout kernel is given. Torch-free.
#pragma once

#include "view.h"

namespace cxv {

// out = f(x) · keep / P(keep) + residual over contiguous arrays; element i of them is element offset + i of the mask.
struct DropoutParams {
  DType dtype;
  enum Map { kIdentity, kGelu, kGeluGradient } map;  // f(x): x, GELU(x), x · GELU'(activated)
  const void* x;
  const void* activated;  // for kGeluGradient
  const void* residual;   // or null
  void* out;
  int64_t count, offset;
  uint64_t seed;
  int32_t threshold;  // an element is kept if its 16 random bits are below: P(keep) = threshold / 65536
};

// Elements that share 16 Philox counters; a kernel's work is dealt in blocks of the mask.
inline constexpr int64_t kDropoutBlock = 128;

}  // namespace cxv
