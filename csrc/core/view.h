// Tensors as kernels see them: plain pointers and strides. Torch-free.
#pragma once

#include <cstdint>

namespace cxv {

enum class DType { kDouble, kFloat, kHalf, kBFloat16 };

// A tensor of four dimensions, (B, H, N, C) or (B, C, H, W); strides in elements.
struct View {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
};

}  // namespace cxv
