// linear_attention and kv_state on CUDA: checks and memory. The arithmetic is in attention_kernel.cuh.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "attention.h"

namespace {

using torch::stable::Tensor;

cxv::LinearAttention describe(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& key_mask,
                              const std::string& feature_map, double eps) {
  const auto p = cxv::describe(q, k, v, key_mask, cxv::feature_map_of(feature_map), eps);
  cxv::cuda::check_supported(p);
  return p;
}

cxv::Tensors forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_mask, std::string feature_map,
                     double eps) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  auto p = describe(q, k, v, key_mask, feature_map, eps);
  if (p.feature_map == cxv::FeatureMap::kElu) p.feature_map = cxv::FeatureMap::kEluExact;
  return cxv::cuda::attention_forward(p, q);
}

cxv::Tensors backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_mask, Tensor state,
                      Tensor key_stat, std::string feature_map, double eps, std::vector<bool> needed) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  auto p = describe(q, k, v, key_mask, feature_map, eps);
  if (p.feature_map == cxv::FeatureMap::kElu) p.feature_map = cxv::FeatureMap::kEluExact;
  return cxv::cuda::attention_backward(p, grad_out, q, k, v, state, key_stat, needed);
}

std::tuple<Tensor, Tensor> kv_state_forward(Tensor k, Tensor v, std::optional<Tensor> key_mask,
                                            std::string feature_map) {
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  auto p = describe(k, k, v, key_mask, feature_map, 0);
  Tensor state = cxv::new_accumulator(k, {p.batch, p.heads, p.dim, p.value_dim});
  Tensor key_stat = cxv::new_accumulator(k, {p.batch, p.heads, p.dim});
  p.state = state.data_ptr();
  p.key_stat = key_stat.data_ptr();
  const auto& kernels = cxv::cuda::attention_kernels(p, k);
  Tensor scratch = cxv::new_accumulator(k, {cxv::cuda::scratch_size(p, false)});
  kernels.key_state(p, static_cast<float*>(scratch.data_ptr()), cxv::cuda::stream_of(k));
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
  const auto& kernels = cxv::cuda::attention_kernels(p, k);
  Tensor scratch = cxv::new_accumulator(k, {cxv::cuda::scratch_size(p, false)});
  kernels.key_state_gradients(p, static_cast<float*>(scratch.data_ptr()), cxv::cuda::stream_of(k));
  return {grad_k.tensor, grad_v.tensor};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CUDA, m) {
  m.impl("linear_attention_forward", TORCH_BOX(&forward));
  m.impl("linear_attention_backward", TORCH_BOX(&backward));
  m.impl("kv_state_forward", TORCH_BOX(&kv_state_forward));
  m.impl("kv_state_backward", TORCH_BOX(&kv_state_backward));
}
