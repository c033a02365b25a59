// performer_attention and performer_features: checks and allocation. They are linear attention whose feature maps are
// functions of a projection.
#include <torch/csrc/stable/library.h>

#include <string>

#include "linear_attention.h"

namespace cxv {
namespace {

// performer_features needs no separate map for FAVOR+ without eps.
FeatureMap feature_map_of(const std::string& kernel, bool exact) {
  STD_TORCH_CHECK(kernel == "softmax" || kernel == "relu", "cxv_kernels: kernel must be softmax or relu, got ", kernel);
  return kernel == "relu" ? FeatureMap::kFavorRelu : exact ? FeatureMap::kFavorExact : FeatureMap::kFavor;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> performer_attention_forward(Tensor q, Tensor k, Tensor v, Tensor projection,
                                                                       std::optional<Tensor> key_mask,
                                                                       std::string kernel, double eps) {
  const OnDevice guard(q);
  auto p = make_params(q, k, v, key_mask, feature_map_of(kernel, eps == 0), eps, &projection);
  Tensor key_max = new_accumulator(q, {p.batch, p.heads});
  p.key_max = key_max.data_ptr();
  auto [out, state, key_stat] = forward(p, q);
  return {out, state, key_stat, key_max};
}

Tensors performer_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor projection,
                                     std::optional<Tensor> key_mask, Tensor state, Tensor key_stat, Tensor key_max,
                                     std::string kernel, double eps, std::vector<bool> needed) {
  const OnDevice guard(q);
  auto p = make_params(q, k, v, key_mask, feature_map_of(kernel, eps == 0), eps, &projection);
  p.key_max = checked_data("key_max", key_max, q, {p.batch, p.heads});
  return backward(p, grad_out, q, k, v, state, key_stat, needed);
}

std::tuple<Tensor, Tensor> performer_features_forward(Tensor x, Tensor projection, bool is_query, std::string kernel,
                                                      double eps) {
  const OnDevice guard(x);
  auto p = make_params(x, x, x, std::nullopt, feature_map_of(kernel, false), eps, &projection);
  Tensor phi = new_like(x, {p.batch, p.heads, p.queries, p.features});
  Tensor key_max = torch::stable::new_zeros(x, {p.batch, p.heads}, accumulator_of(x));
  p.out = view(phi);
  if (!is_query && p.feature_map == FeatureMap::kFavor && p.queries > 0) key_max = device::features_max(p, x);
  if (!is_query) p.key_max = key_max.data_ptr();
  device::run(Call::kFeaturesForward, p, x);
  return {phi, key_max};
}

Tensor performer_features_backward(Tensor grad_phi, Tensor x, Tensor projection, Tensor key_max, bool is_query,
                                   std::string kernel, double eps) {
  const OnDevice guard(x);
  auto p = make_params(x, x, x, std::nullopt, feature_map_of(kernel, false), eps, &projection);
  check("grad_phi", grad_phi, x, {p.batch, p.heads, p.queries, p.features}, x.scalar_type());
  void* const data = checked_data("key_max", key_max, x, {p.batch, p.heads});
  if (!is_query) p.key_max = data;
  Tensor grad_x = new_like(x, {p.batch, p.heads, p.queries, p.dim});
  p.grad_out = view(grad_phi);
  p.grad_q = view(grad_x);
  device::run(Call::kFeaturesBackward, p, x);
  return grad_x;
}

}  // namespace
}  // namespace cxv

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CXV_DEVICE, m) {
  m.impl("performer_attention_forward", TORCH_BOX(&cxv::performer_attention_forward));
  m.impl("performer_attention_backward", TORCH_BOX(&cxv::performer_attention_backward));
  m.impl("performer_features_forward", TORCH_BOX(&cxv::performer_features_forward));
  m.impl("performer_features_backward", TORCH_BOX(&cxv::performer_features_backward));
}
