// The passes of linear attention over threads, for every op of the family.
#pragma once

#include "../linear_attention.h"
#include "kernels.h"

namespace cxv {

// Tokens of a split: fixed, so that the order of every sum depends on N alone.
inline constexpr int64_t kSplitTokens = 1024;

inline int64_t splits(int64_t tokens) { return std::max<int64_t>((tokens + kSplitTokens - 1) / kSplitTokens, 1); }

inline void set_splits(LinearAttention& p) {
  p.key_splits = splits(p.keys);
  p.query_splits = splits(p.queries);
}

inline int64_t heads(const LinearAttention& p) { return p.batch * p.heads; }

// How many items of a pass leave a partial state at a time: the workspace grows with the threads, not with N.
inline int64_t wave(int64_t items) {
  return std::min<int64_t>(items, std::max<int64_t>(64, 32 * int64_t(torch::stable::get_num_threads())));
}

inline void run(LinearAttentionKernels::Pass pass, const LinearAttention& p, int64_t begin, int64_t end) {
  torch::stable::parallel_for(begin, end, 1, [&](int64_t from, int64_t to) { pass(p, from, to); });
}

// `pass` over a head's splits, a wave at a time, and `fold` over the heads of each wave.
inline void run_folded(LinearAttentionKernels::Pass pass, LinearAttentionKernels::Pass fold, LinearAttention& p,
                       int64_t splits) {
  const int64_t items = heads(p) * splits, size = wave(items);
  for (p.wave_begin = 0; p.wave_begin < items; p.wave_begin = p.wave_end) {
    p.wave_end = std::min(p.wave_begin + size, items);
    run(pass, p, p.wave_begin, p.wave_end);
    run(fold, p, p.wave_begin / splits, (p.wave_end - 1) / splits + 1);
  }
}

inline void run_key_pass(LinearAttention& p, const Tensor& like) {
  Tensor running = new_accumulator(like, {heads(p), p.features + p.value_dim + 1});
  p.running = running.data_ptr();
  const auto& table = kernels().linear_attention;
  run_folded(table.key_pass, table.key_fold, p, p.key_splits);
}

// key_max is made by the caller, where the feature map has one.
inline Tensors run_forward(LinearAttention& p, const Tensor& q) {
  const auto& table = kernels().linear_attention;
  return forward(p, q, wave(heads(p) * p.key_splits), table.key_partial(p), [&] {
    run_key_pass(p, q);
    run(table.query_pass, p, 0, heads(p) * p.query_splits);
  });
}

inline Tensors run_backward(LinearAttention& p, const Tensor& grad_out, const Tensor& q, const Tensor& k,
                            const Tensor& v, const Tensor& state, const Tensor& key_stat,
                            const std::vector<bool>& needed) {
  const auto& table = kernels().linear_attention;
  const int64_t items = heads(p) * p.query_splits;
  return backward(p, grad_out, q, k, v, state, key_stat, needed, wave(items), table.query_partial(p), [&] {
    if (!has_key_gradients(p)) return run(table.query_backward, p, 0, items);
    run_folded(table.query_backward, table.query_backward_fold, p, p.query_splits);
    run(table.key_backward, p, 0, heads(p) * p.key_splits);
  });
}

}  // namespace cxv
