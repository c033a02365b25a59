// Linear attention's host code that the CPU and CUDA share: checks, and the tensors of the two directions.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "include/linear_attention.h"
#include "tensor.h"

namespace cxv {

inline FeatureMap feature_map_of(const std::string& name) {
  if (name == "softmax") return FeatureMap::kSoftmax;
  if (name == "elu") return FeatureMap::kElu;
  STD_TORCH_CHECK(name == "relu", "cxv_kernels: feature_map must be softmax, elu or relu, got ", name);
  return FeatureMap::kRelu;
}

inline LinearAttention describe(const Tensor& q, const Tensor& k, const Tensor& v,
                                const std::optional<Tensor>& key_mask, FeatureMap feature_map, double eps) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "cxv_kernels: q, k and v must have 4 dimensions (B, H, N, D)");
  LinearAttention p = {};
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
    const Tensor& m = *key_mask;
    STD_TORCH_CHECK(m.scalar_type() == ScalarType::Bool && m.dim() == 2 && m.size(0) == p.batch && m.size(1) == p.keys,
                    "cxv_kernels: key_mask must be bool (B, N_k)");
    check_device("key_mask", m, q);
    p.key_mask = static_cast<const bool*>(m.data_ptr());
    p.mask_stride[0] = m.stride(0);
    p.mask_stride[1] = m.stride(1);
  }
  return p;
}

using Tensors = std::tuple<Tensor, Tensor, Tensor>;

// Allocates (out, state, key_stat) and `partials` blocks of workspace, and has `run` fill them. p.key_splits is set.
template <class Run>
Tensors forward(LinearAttention& p, const Tensor& q, int64_t partials, int64_t partial_size, Run&& run) {
  Tensor out = new_like(q, {p.batch, p.heads, p.queries, p.value_dim});
  Tensor state = new_accumulator(q, {p.batch, p.heads, p.features, p.value_dim});
  Tensor key_stat = new_accumulator(q, {p.batch, p.heads, p.features});
  Tensor partial = new_accumulator(q, {partials, partial_size});
  p.out = view(out);
  p.state = state.data_ptr();
  p.key_stat = key_stat.data_ptr();
  p.partial = partial.data_ptr();
  run();
  return {out, state, key_stat};
}

// Allocates the needed gradients of q, k and v and, for the keys', `partials` blocks of workspace, and has `run` fill
// them. p.query_splits is set.
template <class Run>
Tensors backward(LinearAttention& p, const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                 Tensor state, Tensor key_stat, const std::vector<bool>& needed, int64_t partials, int64_t partial_size,
                 Run&& run) {
  check_needed(needed, 3);
  check("grad_out", grad_out, q, {p.batch, p.heads, p.queries, p.value_dim}, q.scalar_type());
  check("state", state, q, {p.batch, p.heads, p.features, p.value_dim}, accumulator_of(q));
  check_accumulator("key_stat", key_stat, q, {p.batch, p.heads, p.features});
  state = torch::stable::contiguous(state);
  key_stat = torch::stable::contiguous(key_stat);
  const Gradient grad_q = new_gradient(q, needed[0]), grad_k = new_gradient(k, needed[1]);
  const Gradient grad_v = new_gradient(v, needed[2]);
  p.grad_out = view(grad_out);
  p.grad_q = grad_q.view;
  p.grad_k = grad_k.view;
  p.grad_v = grad_v.view;
  const int64_t state_heads = has_key_gradients(p) ? p.batch * p.heads : 0;
  Tensor partial = new_accumulator(q, {has_key_gradients(p) ? partials : 0, partial_size});
  Tensor grad_state = new_accumulator(q, {state_heads, p.features * p.value_dim});
  Tensor grad_z = new_accumulator(q, {state_heads, p.features});
  p.state = state.data_ptr();
  p.key_stat = key_stat.data_ptr();
  p.partial = partial.data_ptr();
  p.grad_state = grad_state.data_ptr();
  p.grad_z = grad_z.data_ptr();
  run();
  return {grad_q.tensor, grad_k.tensor, grad_v.tensor};
}

}  // namespace cxv
