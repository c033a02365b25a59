// How the ops reach the kernels of attention_kernel.cuh: one table per dtype, each compiled in a file of its own.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cuda_runtime.h>

#include "../linear_attention.h"

namespace cxv {
namespace cuda {

struct FeaturesSide;

// Each launches on the stream, without waiting. `scratch`: as many floats as scratch_size() says.
struct AttentionKernels {
  using Pass = void (*)(const LinearAttention&, float* scratch, cudaStream_t);
  using Features = void (*)(const LinearAttention&, const FeaturesSide&, cudaStream_t);
  Pass forward, backward;
  Pass key_state;            // state and key_stat (and key_max) of k and v alone
  Pass key_state_gradients;  // grad_k and grad_v, given grad_state and grad_z
  Features features_max, features_forward, features_backward;
  int (*compiled_for)();  // the compute capability, times 10, whose code the current device runs; 0: none
};
extern const AttentionKernels kHalfAttention, kFloatAttention;

void fit_to_card(LinearAttention& p, int multiprocessors);
int64_t scratch_size(const LinearAttention& p, bool backward);  // p fits the card

// Raises what these kernels do not support.
inline void check_supported(const LinearAttention& p) {
  STD_TORCH_CHECK(p.dtype == DType::kFloat || p.dtype == DType::kHalf,
                  "cxv_kernels: on CUDA attention supports float16 and float32");
  STD_TORCH_CHECK(p.dim <= 64 && p.value_dim <= 64,
                  "cxv_kernels: on CUDA attention supports heads of at most 64 "
                  "channels (D and E), got ",
                  p.dim, " and ", p.value_dim);
}

// The kernels for p's dtype on q's device, which p then fits.
inline const AttentionKernels& attention_kernels(LinearAttention& p, const Tensor& q) {
  int multiprocessors = 0;
  STD_TORCH_CHECK(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, q.get_device_index()) == cudaSuccess,
      "cxv_kernels: the number of the device's multiprocessors is unknown");
  fit_to_card(p, multiprocessors);
  return p.dtype == DType::kHalf ? kHalfAttention : kFloatAttention;
}

inline cudaStream_t stream_of(const Tensor& q) {
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// The tensors of the two directions, and the kernels that fill them.
inline Tensors attention_forward(LinearAttention& p, const Tensor& q) {
  const auto& kernels = attention_kernels(p, q);
  return forward(p, q, 1, scratch_size(p, false),
                 [&] { kernels.forward(p, static_cast<float*>(p.partial), stream_of(q)); });
}
inline Tensors attention_backward(LinearAttention& p, const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                  const Tensor& v, const Tensor& state, const Tensor& key_stat,
                                  const std::vector<bool>& needed) {
  const auto& kernels = attention_kernels(p, q);
  return backward(p, grad_out, q, k, v, state, key_stat, needed, 0, 0, [&] {
    Tensor scratch = new_accumulator(q, {scratch_size(p, true)});
    kernels.backward(p, static_cast<float*>(scratch.data_ptr()), stream_of(q));
  });
}

}  // namespace cuda
}  // namespace cxv
