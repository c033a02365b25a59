// linear_attention and kv_state on CUDA: checks, memory, launches. The arithmetic of 16-bit heads is in
// attention_kernel.cuh, of the others in linear_attention_kernel.cuh.
#include "linear_attention_kernel.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <limits>

#include "attention.h"

namespace {

using torch::stable::Tensor;

cxv::LinearAttention describe(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& key_mask,
                              const std::string& feature_map, double eps) {
  const auto p = cxv::describe(q, k, v, key_mask, cxv::feature_map_of(feature_map), eps);
  cxv::cuda::check_sizes(p, cxv::cuda::kMaxDim);
  return p;
}

// 16-bit heads of up to 64 channels; the rest, exactly, on CUDA cores.
bool on_tensor_cores(const cxv::LinearAttention& p) {
  return (p.dtype == cxv::DType::kHalf || p.dtype == cxv::DType::kBFloat16) && p.dim <= 64 && p.value_dim <= 64;
}

// Launches on q's device and the caller's stream, without waiting.
struct Launch {
  const cxv::LinearAttention& p;
  const cxv::cuda::Plan& plan;
  cudaStream_t stream;

  Launch(const cxv::LinearAttention& p, const cxv::cuda::Plan& plan, const Tensor& q)
      : p(p), plan(plan), stream(cxv::cuda::stream_of(q)) {}
  template <class Kernel>
  void operator()(Kernel kernel, int64_t blocks, int threads, int bytes) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(),
                    "cxv_kernels: q or k has too many heads and tokens for a grid");
    kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(p, plan);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

// f(plan, launch) for what runs on CUDA cores, p's splits being set.
template <class F>
auto on_cuda_cores(cxv::LinearAttention& p, const Tensor& q, bool forward, F&& f) {
  const auto plan = cxv::cuda::make_plan(p, cxv::cuda::accumulator_bytes(p));
  cxv::cuda::set_splits(p, plan, forward);
  return f(plan, Launch(p, plan, q));
}

cxv::Tensors forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_mask, std::string feature_map,
                     double eps) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  auto p = describe(q, k, v, key_mask, feature_map, eps);
  if (p.feature_map == cxv::FeatureMap::kElu) p.feature_map = cxv::FeatureMap::kEluExact;
  if (on_tensor_cores(p)) return cxv::cuda::attention_forward(p, q);
  return on_cuda_cores(p, q, /*forward=*/true, [&](const auto& plan, const auto& launch) {
    return cxv::forward(p, q, p.batch * p.heads * p.key_splits, 2 * p.dim + p.dim * p.value_dim, [&] {
      cxv::cuda::for_dtype(p.dtype, [&](auto x) { cxv::cuda::forward<decltype(x)>(p, plan, launch); });
    });
  });
}

cxv::Tensors backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_mask, Tensor state,
                      Tensor key_stat, std::string feature_map, double eps, std::vector<bool> needed) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  auto p = describe(q, k, v, key_mask, feature_map, eps);
  if (p.feature_map == cxv::FeatureMap::kElu) p.feature_map = cxv::FeatureMap::kEluExact;
  if (on_tensor_cores(p)) return cxv::cuda::attention_backward(p, grad_out, q, k, v, state, key_stat, needed);
  return on_cuda_cores(p, q, /*forward=*/false, [&](const auto& plan, const auto& launch) {
    const int64_t partials = p.batch * p.heads * p.query_splits, partial_size = p.dim + p.dim * p.value_dim;
    return cxv::backward(p, grad_out, q, k, v, state, key_stat, needed, partials, partial_size, [&] {
      cxv::cuda::for_dtype(p.dtype, [&](auto x) { cxv::cuda::backward<decltype(x)>(p, plan, launch); });
    });
  });
}

std::tuple<Tensor, Tensor> kv_state_forward(Tensor k, Tensor v, std::optional<Tensor> key_mask,
                                            std::string feature_map) {
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  auto p = describe(k, k, v, key_mask, feature_map, 0);
  Tensor state = cxv::new_accumulator(k, {p.batch, p.heads, p.dim, p.value_dim});
  Tensor key_stat = cxv::new_accumulator(k, {p.batch, p.heads, p.dim});
  p.state = state.data_ptr();
  p.key_stat = key_stat.data_ptr();
  if (on_tensor_cores(p)) {
    const auto& kernels = cxv::cuda::attention_kernels(p, k);
    Tensor scratch = cxv::new_accumulator(k, {cxv::cuda::scratch_size(p, false)});
    kernels.key_state(p, static_cast<float*>(scratch.data_ptr()), cxv::cuda::stream_of(k));
  } else {
    on_cuda_cores(p, k, /*forward=*/true, [&](const auto& plan, const auto& launch) {
      Tensor partial = cxv::new_accumulator(k, {p.batch * p.heads * p.key_splits, 2 * p.dim + p.dim * p.value_dim});
      p.partial = partial.data_ptr();
      cxv::cuda::for_dtype(p.dtype, [&](auto x) { cxv::cuda::key_state<decltype(x)>(p, plan, launch); });
    });
  }
  return {state, key_stat};
}

std::tuple<Tensor, Tensor> kv_state_backward(Tensor grad_state, Tensor grad_z, Tensor k, Tensor v,
                                             std::optional<Tensor> key_mask, Tensor key_stat, std::string feature_map,
                                             std::vector<bool> needed) {
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  auto p = describe(k, k, v, key_mask, feature_map, 0);
  cxv::check_needed(needed, 2);
  cxv::check_accumulator("grad_state", grad_state, k, {p.batch, p.heads, p.dim, p.value_dim});
  cxv::check_accumulator("grad_z", grad_z, k, {p.batch, p.heads, p.dim});
  cxv::check_accumulator("key_stat", key_stat, k, {p.batch, p.heads, p.dim});
  grad_state = torch::stable::contiguous(grad_state);
  grad_z = torch::stable::contiguous(grad_z);
  key_stat = torch::stable::contiguous(key_stat);
  const auto grad_k = cxv::new_gradient(k, needed[0]), grad_v = cxv::new_gradient(v, needed[1]);
  p.grad_k = grad_k.view;
  p.grad_v = grad_v.view;
  p.grad_state = grad_state.data_ptr();
  p.grad_z = grad_z.data_ptr();
  p.key_stat = key_stat.data_ptr();
  if (on_tensor_cores(p)) {
    const auto& kernels = cxv::cuda::attention_kernels(p, k);
    Tensor scratch = cxv::new_accumulator(k, {cxv::cuda::scratch_size(p, false)});
    kernels.key_state_gradients(p, static_cast<float*>(scratch.data_ptr()), cxv::cuda::stream_of(k));
  } else {
    on_cuda_cores(p, k, /*forward=*/false, [&](const auto& plan, const auto& launch) {
      cxv::cuda::for_dtype(p.dtype, [&](auto x) { cxv::cuda::key_gradients<decltype(x)>(p, plan, launch); });
    });
  }
  return {grad_k.tensor, grad_v.tensor};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CUDA, m) {
  m.impl("linear_attention_forward", TORCH_BOX(&forward));
  m.impl("linear_attention_backward", TORCH_BOX(&backward));
  m.impl("kv_state_forward", TORCH_BOX(&kv_state_forward));
  m.impl("kv_state_backward", TORCH_BOX(&kv_state_backward));
}
