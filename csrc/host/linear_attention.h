// Checks and tensors that linear_attention and performer_attention share.
#pragma once

#include <tuple>
#include <vector>

#include "device.h"

namespace cxv {

using Tensors = std::tuple<Tensor, Tensor, Tensor>;

// `projection` becomes contiguous.
inline LinearAttentionParams make_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const std::optional<Tensor>& key_mask, FeatureMap feature_map, double eps,
                                         Tensor* projection = nullptr) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "cxv_kernels: q, k and v must have 4 dimensions (B, H, N, D)");
  LinearAttentionParams p = {};
  p.dtype = dtype_of(q);
  p.feature_map = feature_map;
  p.eps = eps;
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.queries = q.size(2);
  p.dim = p.features = q.size(3);
  p.keys = k.size(2);
  p.value_dim = v.size(3);
  check("k", k, q, {p.batch, p.heads, p.keys, p.dim}, q.scalar_type());
  check("v", v, q, {p.batch, p.heads, p.keys, p.value_dim}, q.scalar_type());
  p.q = view(q);
  p.k = view(k);
  p.v = view(v);
  if (key_mask.has_value()) {
    check("key_mask", *key_mask, q, {p.batch, p.keys}, ScalarType::Bool);
    p.key_mask = static_cast<const bool*>(key_mask->data_ptr());
    p.mask_stride[0] = key_mask->stride(0);
    p.mask_stride[1] = key_mask->stride(1);
  }
  if (projection != nullptr) {
    STD_TORCH_CHECK(projection->dim() == 2 && projection->size(0) > 0,
                    "cxv_kernels: projection must have 2 dimensions (M, D), and M must be at least 1");
    p.features = projection->size(0);
    p.projection = checked_data("projection", *projection, q, {p.features, p.dim});
  }
  device::plan(p);
  return p;
}

// Allocates (out, state, key_stat) and fills them. p.key_max is set by the caller, where the feature map has one.
inline Tensors forward(LinearAttentionParams& p, const Tensor& q) {
  Tensor out = new_like(q, {p.batch, p.heads, p.queries, p.value_dim});
  Tensor state = new_accumulator(q, {p.batch, p.heads, p.features, p.value_dim});
  Tensor key_stat = new_accumulator(q, {p.batch, p.heads, p.features});
  p.out = view(out);
  p.state = state.data_ptr();
  p.key_stat = key_stat.data_ptr();
  device::run(Call::kForward, p, q);
  return {out, state, key_stat};
}

// Allocates the needed gradients of q, k and v and fills them.
inline Tensors backward(LinearAttentionParams& p, const Tensor& grad_out, const Tensor& q, const Tensor& k,
                        const Tensor& v, Tensor state, Tensor key_stat, const std::vector<bool>& needed) {
  check("grad_out", grad_out, q, {p.batch, p.heads, p.queries, p.value_dim}, q.scalar_type());
  p.state = checked_data("state", state, q, {p.batch, p.heads, p.features, p.value_dim});
  p.key_stat = checked_data("key_stat", key_stat, q, {p.batch, p.heads, p.features});
  const Tensors grads = new_gradients(needed, {{q, &p.grad_q}, {k, &p.grad_k}, {v, &p.grad_v}});
  p.grad_out = view(grad_out);
  const int64_t state_heads = has_key_gradients(p) ? p.batch * p.heads : 0;
  Tensor grad_state = new_accumulator(q, {state_heads, p.features * p.value_dim});
  Tensor grad_z = new_accumulator(q, {state_heads, p.features});
  p.grad_state = grad_state.data_ptr();
  p.grad_z = grad_z.data_ptr();
  device::run(Call::kBackward, p, q);
  return grads;
}

}  // namespace cxv
