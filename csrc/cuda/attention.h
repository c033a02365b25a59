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
extern const AttentionKernels kHalfAttention, kBFloat16Attention, kFloatAttention;  // float: with a projection only

void fit_to_card(LinearAttention& p, int compute_major, int multiprocessors);
int64_t scratch_size(const LinearAttention& p, bool backward);  // p fits the card

// D and E that these kernels serve, and what they do not, in words.
inline void check_sizes(const LinearAttention& p, int64_t most) {
  STD_TORCH_CHECK(p.dim <= most && p.value_dim <= most, "cxv_kernels: on CUDA this op serves heads of at most ", most,
                  " channels (D and E), got ", p.dim, " and ", p.value_dim);
}

// The kernels for p's dtype on q's device, which p then fits.
inline const AttentionKernels& attention_kernels(LinearAttention& p, const Tensor& q) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    STD_TORCH_CHECK(cudaDeviceGetAttribute(&value, which, q.get_device_index()) == cudaSuccess,
                    "cxv_kernels: the device does not tell its compute capability and multiprocessors");
    return value;
  };
  // A newer card may run sm_75's code, which is all that a library of its PTX alone has.
  STD_TORCH_CHECK(p.dtype != DType::kBFloat16 || kBFloat16Attention.compiled_for() >= 80,
                  "cxv_kernels: bfloat16 needs tensor cores of compute capability 8.0 and up, and kernels built for "
                  "them (TORCH_CUDA_ARCH_LIST): use float16 or float32");
  fit_to_card(p, attribute(cudaDevAttrComputeCapabilityMajor), attribute(cudaDevAttrMultiProcessorCount));
  return p.dtype == DType::kBFloat16 ? kBFloat16Attention : p.dtype == DType::kHalf ? kHalfAttention : kFloatAttention;
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
