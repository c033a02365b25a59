// Launches, and linear attention for each dtype.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>

#include "linear_attention/launch.cuh"

namespace cxv::cuda {

// Launches on a stream, without waiting.
struct Launch {
  cudaStream_t stream;
  template <class Kernel, class... Arguments>
  void operator()(Kernel kernel, int64_t blocks, int threads, int bytes, const Arguments&... arguments) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(),
                    "cxv_kernels: the batch has too many heads and tokens for a grid");
    kernel<<<unsigned(blocks), threads, bytes, stream>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

// In linear_attention/float16.cu and float32.cu: two files, so that they compile side by side.
extern template void run<__half>(Call, const Work&, const Launch&);
extern template void run<float>(Call, const Work&, const Launch&);

}  // namespace cxv::cuda
