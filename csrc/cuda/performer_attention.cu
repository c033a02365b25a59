// performer_attention and performer_features on CUDA: checks, memory, launches.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "attention.h"
#include "attention_kernel.cuh"

namespace {

using cxv::FeatureMap;
using cxv::LinearAttention;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// p.projection is that of `projection`, made contiguous.
void set_projection(LinearAttention& p, Tensor& projection, const Tensor& q, const std::string& kernel) {
  STD_TORCH_CHECK(kernel == "softmax" || kernel == "relu", "cxv_kernels: kernel must be softmax or relu, got ", kernel);
  cxv::cuda::check_supported(p);
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
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor projection,
                                                   std::optional<Tensor> key_mask, std::string kernel, double eps) {
  const DeviceGuard guard(q.get_device_index());
  auto p = describe(q, k, v, projection, key_mask, kernel, eps);
  Tensor key_max = cxv::new_accumulator(q, {p.batch, p.heads});
  p.key_max = key_max.data_ptr();
  auto [out, state, key_stat] = cxv::cuda::attention_forward(p, q);
  return {out, state, key_stat, key_max};
}

cxv::Tensors backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor projection, std::optional<Tensor> key_mask,
                      Tensor state, Tensor key_stat, Tensor key_max, std::string kernel, double eps,
                      std::vector<bool> needed) {
  const DeviceGuard guard(q.get_device_index());
  auto p = describe(q, k, v, projection, key_mask, kernel, eps);
  cxv::check_accumulator("key_max", key_max, q, {p.batch, p.heads});
  key_max = torch::stable::contiguous(key_max);
  p.key_max = key_max.data_ptr();
  return cxv::cuda::attention_backward(p, grad_out, q, k, v, state, key_stat, needed);
}

LinearAttention describe_features(const Tensor& x, Tensor& projection, const std::string& kernel, double eps) {
  auto p = cxv::describe(x, x, x, std::nullopt, kernel == "relu" ? FeatureMap::kFavorRelu : FeatureMap::kFavor, eps);
  set_projection(p, projection, x, kernel);
  return p;
}

std::tuple<Tensor, Tensor> features_forward(Tensor x, Tensor projection, bool is_query, std::string kernel,
                                            double eps) {
  const DeviceGuard guard(x.get_device_index());
  auto p = describe_features(x, projection, kernel, eps);
  const auto& kernels = cxv::cuda::attention_kernels(p, x);
  Tensor phi = cxv::new_like(x, {p.batch, p.heads, p.queries, p.features});
  Tensor key_max = torch::stable::new_zeros(x, {p.batch, p.heads}, cxv::accumulator_of(x));
  cxv::cuda::FeaturesSide side = {cxv::view(x), cxv::view(phi), {}, nullptr, nullptr, p.queries, 0};
  if (!is_query && p.feature_map == FeatureMap::kFavor && p.queries > 0) {
    Tensor block_max = cxv::new_accumulator(x, {p.batch, p.heads, cxv::cuda::features_maxima(p)});
    side.block_max = static_cast<float*>(block_max.data_ptr());
    kernels.features_max(p, side, cxv::cuda::stream_of(x));
    key_max = torch::stable::amax(block_max, {-1}, false);
  }
  if (!is_query) side.key_max = static_cast<const float*>(key_max.data_ptr());
  kernels.features_forward(p, side, cxv::cuda::stream_of(x));
  return {phi, key_max};
}

Tensor features_backward(Tensor grad_phi, Tensor x, Tensor projection, Tensor key_max, bool is_query,
                         std::string kernel, double eps) {
  const DeviceGuard guard(x.get_device_index());
  auto p = describe_features(x, projection, kernel, eps);
  cxv::check("grad_phi", grad_phi, x, {p.batch, p.heads, p.queries, p.features}, x.scalar_type());
  cxv::check_accumulator("key_max", key_max, x, {p.batch, p.heads});
  key_max = torch::stable::contiguous(key_max);
  Tensor grad_x = cxv::new_like(x, {p.batch, p.heads, p.queries, p.dim});
  const cxv::cuda::FeaturesSide side = {cxv::view(x),
                                        cxv::view(grad_phi),
                                        cxv::view(grad_x),
                                        is_query ? nullptr : static_cast<float*>(key_max.data_ptr()),
                                        nullptr,
                                        p.queries,
                                        0};
  cxv::cuda::attention_kernels(p, x).features_backward(p, side, cxv::cuda::stream_of(x));
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CUDA, m) {
  m.impl("performer_attention_forward", TORCH_BOX(&forward));
  m.impl("performer_attention_backward", TORCH_BOX(&backward));
  m.impl("performer_features_forward", TORCH_BOX(&features_forward));
  m.impl("performer_features_backward", TORCH_BOX(&features_backward));
}
