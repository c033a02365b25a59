// linear_attention on the CPU: checks, allocation, threads. The arithmetic is in linear_attention_kernel.h.
#include "../include/linear_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tokens of a split: fixed, so that the order of every sum depends on N alone; more tokens than
// kMaxSplits · kSplitTokens make longer splits, not more of them.
constexpr int64_t kSplitTokens = 1024;
constexpr int64_t kMaxSplits = 64;

int64_t splits(int64_t tokens) {
  return std::clamp<int64_t>((tokens + kSplitTokens - 1) / kSplitTokens, 1, kMaxSplits);
}

const cxv::LinearAttentionKernels& kernels() {
#if defined(__x86_64__)
  switch (cxv::cpu_isa()) {
    case cxv::Isa::kAvx512:
      return cxv::kLinearAttentionAvx512;
    case cxv::Isa::kAvx2:
      return cxv::kLinearAttentionAvx2;
    case cxv::Isa::kBaseline:
      break;
  }
#endif
  return cxv::kLinearAttentionBaseline;
}

cxv::DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return cxv::DType::kDouble;
    case ScalarType::Float:
      return cxv::DType::kFloat;
    case ScalarType::Half:
      return cxv::DType::kHalf;
    case ScalarType::BFloat16:
      return cxv::DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "cxv_kernels: q must be float64, float32, float16 or bfloat16");
  }
}

cxv::FeatureMap feature_map_of(const std::string& name) {
  if (name == "softmax") return cxv::FeatureMap::kSoftmax;
  if (name == "elu") return cxv::FeatureMap::kElu;
  STD_TORCH_CHECK(name == "relu", "cxv_kernels: feature_map must be softmax, elu or relu, got ", name);
  return cxv::FeatureMap::kRelu;
}

void check(const char* name, const Tensor& t, std::array<int64_t, 4> shape, ScalarType dtype) {
  STD_TORCH_CHECK(t.dim() == 4, "cxv_kernels: ", name, " must have 4 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == dtype, "cxv_kernels: ", name, " must have q's dtype");
  for (int i = 0; i < 4; ++i)
    STD_TORCH_CHECK(t.size(i) == shape[i], "cxv_kernels: ", name, " has size ", t.size(i), " in dimension ", i,
                    ", expected ", shape[i]);
}

cxv::View view(const Tensor& t) {
  cxv::View v;
  v.data = t.data_ptr();
  for (int i = 0; i < 4; ++i) v.stride[i] = t.stride(i);
  return v;
}

// A tensor of this shape whose dimensions lie in memory in the order of like's; like_layout in op.py says the same.
Tensor new_like(const Tensor& like, std::array<int64_t, 4> shape) {
  std::array<int64_t, 4> order = {0, 1, 2, 3}, strides;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return like.stride(a) > like.stride(b); });
  int64_t step = 1;
  for (int i = 3; i >= 0; --i) {
    strides[order[i]] = step;
    step *= std::max<int64_t>(shape[order[i]], 1);
  }
  AtenTensorHandle handle;
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, shape.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor new_accumulator(const Tensor& like, std::initializer_list<int64_t> shape) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  return torch::stable::new_empty(like, shape, wide ? ScalarType::Double : ScalarType::Float);
}

void run(cxv::LinearAttentionKernels::Pass pass, const cxv::LinearAttention& p, int64_t items) {
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) { pass(p, begin, end); });
}

cxv::LinearAttention describe(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& key_mask,
                              const std::string& feature_map, double eps) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "cxv_kernels: q, k and v must have 4 dimensions (B, H, N, D)");
  cxv::LinearAttention p;
  p.dtype = dtype_of(q);
  p.feature_map = feature_map_of(feature_map);
  p.eps = eps;
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.queries = q.size(2);
  p.dim = q.size(3);
  p.keys = k.size(2);
  p.value_dim = v.size(3);
  check("k", k, {p.batch, p.heads, p.keys, p.dim}, q.scalar_type());
  check("v", v, {p.batch, p.heads, p.keys, p.value_dim}, q.scalar_type());
  p.q = view(q);
  p.k = view(k);
  p.v = view(v);
  if (key_mask.has_value()) {
    const Tensor& m = *key_mask;
    STD_TORCH_CHECK(m.scalar_type() == ScalarType::Bool && m.dim() == 2 && m.size(0) == p.batch && m.size(1) == p.keys,
                    "cxv_kernels: key_mask must be bool (B, N_k)");
    p.key_mask = static_cast<const bool*>(m.data_ptr());
    p.mask_stride[0] = m.stride(0);
    p.mask_stride[1] = m.stride(1);
  }
  p.key_splits = splits(p.keys);
  p.query_splits = splits(p.queries);
  return p;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_mask,
                                           std::string feature_map, double eps) {
  auto p = describe(q, k, v, key_mask, feature_map, eps);
  Tensor out = new_like(q, {p.batch, p.heads, p.queries, p.value_dim});
  Tensor state = new_accumulator(q, {p.batch, p.heads, p.dim, p.value_dim});
  Tensor key_stat = new_accumulator(q, {p.batch, p.heads, p.dim});
  const int64_t heads = p.batch * p.heads;
  Tensor partial = new_accumulator(q, {heads * p.key_splits, 2 * p.dim + p.dim * p.value_dim});
  p.out = view(out);
  p.state = state.data_ptr();
  p.key_stat = key_stat.data_ptr();
  p.partial = partial.data_ptr();
  const auto& kernel = kernels();
  run(kernel.key_pass, p, heads * p.key_splits);
  run(kernel.key_reduce, p, heads);
  run(kernel.query_pass, p, heads * p.query_splits);
  return {out, state, key_stat};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor q, Tensor k, Tensor v,
                                            std::optional<Tensor> key_mask, Tensor state, Tensor key_stat,
                                            std::string feature_map, double eps) {
  auto p = describe(q, k, v, key_mask, feature_map, eps);
  check("grad_out", grad_out, {p.batch, p.heads, p.queries, p.value_dim}, q.scalar_type());
  const auto accumulate = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check("state", state, {p.batch, p.heads, p.dim, p.value_dim}, accumulate);
  STD_TORCH_CHECK(key_stat.scalar_type() == accumulate && key_stat.numel() == p.batch * p.heads * p.dim,
                  "cxv_kernels: key_stat must be (B, H, D) in the dtype of state");
  state = torch::stable::contiguous(state);
  key_stat = torch::stable::contiguous(key_stat);
  Tensor grad_q = new_like(q, {p.batch, p.heads, p.queries, p.dim});
  Tensor grad_k = new_like(k, {p.batch, p.heads, p.keys, p.dim});
  Tensor grad_v = new_like(v, {p.batch, p.heads, p.keys, p.value_dim});
  const int64_t heads = p.batch * p.heads;
  Tensor partial = new_accumulator(q, {heads * p.query_splits, p.dim + p.dim * p.value_dim});
  Tensor grad_state = new_accumulator(q, {heads, p.dim * p.value_dim});
  Tensor grad_z = new_accumulator(q, {heads, p.dim});
  p.grad_out = view(grad_out);
  p.grad_q = view(grad_q);
  p.grad_k = view(grad_k);
  p.grad_v = view(grad_v);
  p.state = state.data_ptr();
  p.key_stat = key_stat.data_ptr();
  p.partial = partial.data_ptr();
  p.grad_state = grad_state.data_ptr();
  p.grad_z = grad_z.data_ptr();
  const auto& kernel = kernels();
  run(kernel.query_backward, p, heads * p.query_splits);
  run(kernel.query_backward_reduce, p, heads);
  run(kernel.key_backward, p, heads * p.key_splits);
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CPU, m) {
  m.impl("linear_attention_forward", TORCH_BOX(&forward));
  m.impl("linear_attention_backward", TORCH_BOX(&backward));
}
