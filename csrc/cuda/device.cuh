// Launches, and the functions that device.cu calls in the files of the dtypes.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>

#include "linear_attention/launch.cuh"

namespace cxv {
namespace cuda {

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
void run_float16(Call call, const LinearAttentionParams& p, const Workspace& work, const Launch& launch);
void run_float32(Call call, const LinearAttentionParams& p, const Workspace& work, const Launch& launch);

}  // namespace cuda
}  // namespace cxv
