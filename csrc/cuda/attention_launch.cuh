// The table of attention_kernel.cuh for one dtype.
#pragma once

#include "attention.h"

#include <torch/csrc/stable/macros.h>

#include <limits>

#include "attention_kernel.cuh"

namespace cxv {
namespace cuda {

struct Launch {
  const LinearAttention& p;
  const Work& work;
  cudaStream_t stream;
  template <class Kernel, class Argument>
  void operator()(Kernel kernel, int64_t blocks, int threads, int bytes, const Argument& argument) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(),
                    "cxv_kernels: q or k has too many heads and tokens for a grid");
    kernel<<<unsigned(blocks), threads, bytes, stream>>>(p, work, argument);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

// f(Passes<T, P, map>) for the p's size and map.
template <class T, class F>
void for_passes(const LinearAttention& p, F&& f) {
  for_map(p.feature_map, [&](auto map) { for_size(p, [&](auto size) { f(Passes<T, size(), map()>()); }); });
}

template <class T, class F>
void run_pass(const LinearAttention& p, float* scratch, bool backward, cudaStream_t stream, F&& f) {
  Work work;
  carve(p, padded_size(p), backward, scratch, &work);
  for_passes<T>(p, [&](auto passes) { f(passes, work, Launch{p, work, stream}); });
}

template <class T, Step step>
void run_features(const LinearAttention& p, const FeaturesSide& side, cudaStream_t stream) {
  const Work work = {};
  for_map(p.feature_map, [&](auto map) {
    if constexpr (map() == Map::kFavor || (kProjected<map()> && step != Step::kMax))  // relu has no maximum
      for_size(
          p, [&](auto size) { Passes<T, size(), map()>::template phi<step>(p, work, side, Launch{p, work, stream}); });
  });
}

template <class T>
constexpr AttentionKernels kernels_of() {
  return {
      [](const LinearAttention& p, float* scratch, cudaStream_t stream) {
        run_pass<T>(p, scratch, false, stream,
                    [&](auto passes, const Work& work, auto launch) { passes.forward(p, work, launch); });
      },
      [](const LinearAttention& p, float* scratch, cudaStream_t stream) {
        run_pass<T>(p, scratch, true, stream,
                    [&](auto passes, const Work& work, auto launch) { passes.backward(p, work, launch); });
      },
      [](const LinearAttention& p, float* scratch, cudaStream_t stream) {
        run_pass<T>(p, scratch, false, stream,
                    [&](auto passes, const Work& work, auto launch) { passes.key_state(p, work, launch); });
      },
      [](const LinearAttention& p, float* scratch, cudaStream_t stream) {
        run_pass<T>(p, scratch, false, stream, [&](auto passes, const Work& work, auto launch) {
          passes.key_gradients(p, work, Role::kState, launch);
        });
      },
      run_features<T, Step::kMax>,
      run_features<T, Step::kForward>,
      run_features<T, Step::kBackward>,
      [] {
        cudaFuncAttributes of = {};
        if (cudaFuncGetAttributes(&of, prepare<T, 16, Map::kFavor>) == cudaSuccess) return of.ptxVersion;
        cudaGetLastError();  // which it leaves behind
        return 0;
      },
  };
}

}  // namespace cuda
}  // namespace cxv
