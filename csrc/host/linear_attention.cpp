// linear_attention and kv_state: checks and allocation.
#include "linear_attention.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace cxv {
namespace {

// kv_state: elu's φ itself, not by its exponents.
FeatureMap feature_map_of(const std::string& name, bool kv_state) {
  if (name == "softmax") return FeatureMap::kSoftmax;
  if (name == "elu") return kv_state ? FeatureMap::kElu : FeatureMap::kEluExact;
  STD_TORCH_CHECK(name == "relu", "cxv_kernels: feature_map must be softmax, elu or relu, got ", name);
  return FeatureMap::kRelu;
}

Tensors linear_attention_forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_mask, std::string feature_map,
                                 double eps) {
  const OnDevice guard(q);
  auto p = make_params(q, k, v, key_mask, feature_map_of(feature_map, false), eps);
  return forward(p, q);
}

Tensors linear_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_mask,
                                  Tensor state, Tensor key_stat, std::string feature_map, double eps,
                                  std::vector<bool> needed) {
  const OnDevice guard(q);
  auto p = make_params(q, k, v, key_mask, feature_map_of(feature_map, false), eps);
  return backward(p, grad_out, q, k, v, state, key_stat, needed);
}

std::tuple<Tensor, Tensor> kv_state_forward(Tensor k, Tensor v, std::optional<Tensor> key_mask,
                                            std::string feature_map) {
  const OnDevice guard(k);
  auto p = make_params(k, k, v, key_mask, feature_map_of(feature_map, true), 0);
  Tensor state = new_accumulator(k, {p.batch, p.heads, p.dim, p.value_dim});
  Tensor key_stat = new_accumulator(k, {p.batch, p.heads, p.dim});
  p.state = state.data_ptr();
  p.key_stat = key_stat.data_ptr();
  device::run(Call::kState, p, k);
  return {state, key_stat};
}

std::tuple<Tensor, Tensor> kv_state_backward(Tensor grad_state, Tensor grad_z, Tensor k, Tensor v,
                                             std::optional<Tensor> key_mask, Tensor key_stat, std::string feature_map,
                                             std::vector<bool> needed) {
  const OnDevice guard(k);
  auto p = make_params(k, k, v, key_mask, feature_map_of(feature_map, true), 0);
  p.grad_state = checked_data("grad_state", grad_state, k, {p.batch, p.heads, p.dim, p.value_dim});
  p.grad_z = checked_data("grad_z", grad_z, k, {p.batch, p.heads, p.dim});
  p.key_stat = checked_data("key_stat", key_stat, k, {p.batch, p.heads, p.dim});
  const std::tuple<Tensor, Tensor> grads = new_gradients(needed, {{k, &p.grad_k}, {v, &p.grad_v}});
  device::run(Call::kStateBackward, p, k);
  return grads;
}

}  // namespace
}  // namespace cxv

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CXV_DEVICE, m) {
  m.impl("linear_attention_forward", TORCH_BOX(&cxv::linear_attention_forward));
  m.impl("linear_attention_backward", TORCH_BOX(&cxv::linear_attention_backward));
  m.impl("kv_state_forward", TORCH_BOX(&cxv::kv_state_forward));
  m.impl("kv_state_backward", TORCH_BOX(&cxv::kv_state_backward));
}
