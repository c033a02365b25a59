// performer_attention and performer_features on the CPU: linear attention whose feature maps are functions of a
// projection. The arithmetic is in linear_attention_kernel.h and feature_map.h.
#include <torch/csrc/stable/library.h>

#include "linear_attention_passes.h"

namespace {

using cxv::FeatureMap;
using cxv::LinearAttention;
using torch::stable::Tensor;

// p.projection is that of `projection`, made contiguous.
void set_projection(LinearAttention& p, Tensor& projection, const Tensor& q, const std::string& kernel) {
  STD_TORCH_CHECK(kernel == "softmax" || kernel == "relu", "cxv_kernels: kernel must be softmax or relu, got ", kernel);
  STD_TORCH_CHECK(projection.dim() == 2 && projection.size(0) > 0 && projection.size(1) == p.dim,
                  "cxv_kernels: projection must be (M, D) with M > 0 and D = ", p.dim);
  cxv::check_accumulator("projection", projection, q, {projection.size(0), p.dim});
  projection = torch::stable::contiguous(projection);
  p.features = projection.size(0);
  p.projection = projection.data_ptr();
}

LinearAttention describe(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& projection,
                         const std::optional<Tensor>& key_mask, const std::string& kernel, double eps) {
  const auto map = kernel == "relu" ? FeatureMap::kFavorRelu : eps == 0 ? FeatureMap::kFavorExact : FeatureMap::kFavor;
  auto p = cxv::describe(q, k, v, key_mask, map, eps);
  set_projection(p, projection, q, kernel);
  cxv::set_splits(p);
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor projection,
                                                   std::optional<Tensor> key_mask, std::string kernel, double eps) {
  auto p = describe(q, k, v, projection, key_mask, kernel, eps);
  Tensor key_max = cxv::new_accumulator(q, {p.batch, p.heads});
  p.key_max = key_max.data_ptr();
  auto [out, state, key_stat] = cxv::run_forward(p, q);
  return {out, state, key_stat, key_max};
}

cxv::Tensors backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor projection, std::optional<Tensor> key_mask,
                      Tensor state, Tensor key_stat, Tensor key_max, std::string kernel, double eps,
                      std::vector<bool> needed) {
  auto p = describe(q, k, v, projection, key_mask, kernel, eps);
  cxv::check_accumulator("key_max", key_max, q, {p.batch, p.heads});
  key_max = torch::stable::contiguous(key_max);
  p.key_max = key_max.data_ptr();
  return cxv::run_backward(p, grad_out, q, k, v, state, key_stat, needed);
}

LinearAttention describe_features(const Tensor& x, Tensor& projection, const std::string& kernel, double eps) {
  auto p = cxv::describe(x, x, x, std::nullopt, kernel == "relu" ? FeatureMap::kFavorRelu : FeatureMap::kFavor, eps);
  set_projection(p, projection, x, kernel);
  cxv::set_splits(p);
  return p;
}

std::tuple<Tensor, Tensor> features_forward(Tensor x, Tensor projection, bool is_query, std::string kernel,
                                            double eps) {
  auto p = describe_features(x, projection, kernel, eps);
  const auto& table = cxv::kernels().linear_attention;
  const int64_t items = cxv::heads(p) * p.query_splits;
  Tensor phi = cxv::new_like(x, {p.batch, p.heads, p.queries, p.features});
  Tensor key_max = torch::stable::new_zeros(x, {p.batch, p.heads}, cxv::accumulator_of(x));
  p.out = cxv::view(phi);
  if (!is_query && p.feature_map == FeatureMap::kFavor && p.queries > 0) {
    Tensor split_max = cxv::new_accumulator(x, {p.batch, p.heads, p.query_splits});
    p.partial = split_max.data_ptr();
    cxv::run(table.features_max, p, 0, items);
    key_max = torch::stable::amax(split_max, {-1}, false);
  }
  if (!is_query) p.key_max = key_max.data_ptr();
  cxv::run(table.features_forward, p, 0, items);
  return {phi, key_max};
}

Tensor features_backward(Tensor grad_phi, Tensor x, Tensor projection, Tensor key_max, bool is_query,
                         std::string kernel, double eps) {
  auto p = describe_features(x, projection, kernel, eps);
  cxv::check("grad_phi", grad_phi, x, {p.batch, p.heads, p.queries, p.features}, x.scalar_type());
  cxv::check_accumulator("key_max", key_max, x, {p.batch, p.heads});
  key_max = torch::stable::contiguous(key_max);
  Tensor grad_x = cxv::new_like(x, {p.batch, p.heads, p.queries, p.dim});
  p.grad_out = cxv::view(grad_phi);
  p.grad_q = cxv::view(grad_x);
  if (!is_query) p.key_max = key_max.data_ptr();
  cxv::run(cxv::kernels().linear_attention.features_backward, p, 0, cxv::heads(p) * p.query_splits);
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CPU, m) {
  m.impl("performer_attention_forward", TORCH_BOX(&forward));
  m.impl("performer_attention_backward", TORCH_BOX(&backward));
  m.impl("performer_features_forward", TORCH_BOX(&features_forward));
  m.impl("performer_features_backward", TORCH_BOX(&features_backward));
}
