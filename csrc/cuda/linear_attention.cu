// linear_attention on CUDA: checks, allocation, launches. The arithmetic is in linear_attention_kernel.cuh.
#include "linear_attention_kernel.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <limits>

#include "../linear_attention.h"

namespace {

using torch::stable::Tensor;

cxv::LinearAttention describe(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& key_mask,
                              const std::string& feature_map, double eps) {
  const auto p = cxv::describe(q, k, v, key_mask, cxv::feature_map_of(feature_map), eps);
  STD_TORCH_CHECK(p.dim <= cxv::cuda::kMaxDim, "cxv_kernels: on CUDA q and k may have a head dimension D of at most ",
                  cxv::cuda::kMaxDim, ", got ", p.dim);
  STD_TORCH_CHECK(p.value_dim <= cxv::cuda::kMaxDim, "cxv_kernels: on CUDA v may have a head dimension E of at most ",
                  cxv::cuda::kMaxDim, ", got ", p.value_dim);
  return p;
}

// Launches on q's device and the caller's stream, without waiting.
struct Launch {
  const cxv::LinearAttention& p;
  const cxv::cuda::Plan& plan;
  cudaStream_t stream;

  Launch(const cxv::LinearAttention& p, const cxv::cuda::Plan& plan, const Tensor& q) : p(p), plan(plan) {
    void* current;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  template <class Kernel>
  void operator()(Kernel kernel, int64_t blocks, int threads, int bytes) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(),
                    "cxv_kernels: q or k has too many heads and tokens for a grid");
    kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(p, plan);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

cxv::Tensors forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_mask, std::string feature_map,
                     double eps) {
  auto p = describe(q, k, v, key_mask, feature_map, eps);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const auto plan = cxv::cuda::make_plan(p, cxv::cuda::accumulator_bytes(p));
  cxv::cuda::set_splits(p, plan, /*forward=*/true);
  const Launch launch(p, plan, q);
  return cxv::forward(p, q, p.batch * p.heads * p.key_splits, 2 * p.dim + p.dim * p.value_dim, [&] {
    cxv::cuda::for_dtype(p.dtype, [&](auto x) { cxv::cuda::forward<decltype(x)>(p, plan, launch); });
  });
}

cxv::Tensors backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_mask, Tensor state,
                      Tensor key_stat, std::string feature_map, double eps) {
  auto p = describe(q, k, v, key_mask, feature_map, eps);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const auto plan = cxv::cuda::make_plan(p, cxv::cuda::accumulator_bytes(p));
  cxv::cuda::set_splits(p, plan, /*forward=*/false);
  const Launch launch(p, plan, q);
  const int64_t partials = p.batch * p.heads * p.query_splits, partial_size = p.dim + p.dim * p.value_dim;
  return cxv::backward(p, grad_out, q, k, v, state, key_stat, partials, partial_size, [&] {
    cxv::cuda::for_dtype(p.dtype, [&](auto x) { cxv::cuda::backward<decltype(x)>(p, plan, launch); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CUDA, m) {
  m.impl("linear_attention_forward", TORCH_BOX(&forward));
  m.impl("linear_attention_backward", TORCH_BOX(&backward));
}
