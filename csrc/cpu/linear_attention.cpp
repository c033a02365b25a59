// linear_attention on the CPU: splits and threads. The arithmetic is in linear_attention_kernel.h.
#include "../linear_attention.h"

#include <torch/csrc/stable/library.h>

#include "kernels.h"

namespace {

using torch::stable::Tensor;

// Tokens of a split: fixed, so that the order of every sum depends on N alone; more tokens than
// kMaxSplits · kSplitTokens make longer splits, not more of them.
constexpr int64_t kSplitTokens = 1024;
constexpr int64_t kMaxSplits = 64;

int64_t splits(int64_t tokens) {
  return std::clamp<int64_t>((tokens + kSplitTokens - 1) / kSplitTokens, 1, kMaxSplits);
}

void run(cxv::LinearAttentionKernels::Pass pass, const cxv::LinearAttention& p, int64_t splits_of_a_head) {
  const int64_t items = p.batch * p.heads * splits_of_a_head;
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) { pass(p, begin, end); });
}

cxv::LinearAttention describe(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& key_mask,
                              const std::string& feature_map, double eps) {
  auto p = cxv::describe(q, k, v, key_mask, feature_map, eps);
  p.key_splits = splits(p.keys);
  p.query_splits = splits(p.queries);
  return p;
}

cxv::Tensors forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_mask, std::string feature_map,
                     double eps) {
  auto p = describe(q, k, v, key_mask, feature_map, eps);
  return cxv::forward(p, q, [&] {
    run(cxv::kernels().linear_attention.key_pass, p, p.key_splits);
    run(cxv::kernels().linear_attention.key_reduce, p, 1);
    run(cxv::kernels().linear_attention.query_pass, p, p.query_splits);
  });
}

cxv::Tensors backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_mask, Tensor state,
                      Tensor key_stat, std::string feature_map, double eps) {
  auto p = describe(q, k, v, key_mask, feature_map, eps);
  return cxv::backward(p, grad_out, q, k, v, state, key_stat, [&] {
    run(cxv::kernels().linear_attention.query_backward, p, p.query_splits);
    run(cxv::kernels().linear_attention.query_backward_reduce, p, 1);
    run(cxv::kernels().linear_attention.key_backward, p, p.key_splits);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CPU, m) {
  m.impl("linear_attention_forward", TORCH_BOX(&forward));
  m.impl("linear_attention_backward", TORCH_BOX(&backward));
}
