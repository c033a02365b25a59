// What a linear-attention kernel is told: plain pointers and strides. Torch-free.
#pragma once

#include "view.h"

namespace cxv {

enum class FeatureMap { kSoftmax, kElu, kRelu };

// Accumulators ("acc") are double for double and float otherwise, contiguous, one block per head.
struct LinearAttention {
  DType dtype;
  FeatureMap feature_map;
  double eps;  // relu: added to the denominator
  int64_t batch, heads, queries, keys, dim, value_dim;
  View q, k, v, out;
  const bool* key_mask = nullptr;  // (B, keys) or null
  int64_t mask_stride[2] = {0, 0};

  // The key pass folds `splits` runs of tokens of a head into partial states, which `key_reduce` adds in order.
  int64_t key_splits, query_splits;
  void* partial;   // acc, heads in all × splits × (D + D + D·E): max, z, S
  void* state;     // acc (B, H, D, E): S, for softmax already divided by z
  void* key_stat;  // acc (B, H, D): z; for softmax log Σ exp

  // Backward.
  View grad_out, grad_q, grad_k, grad_v;
  void* grad_state;  // acc (B, H, D, E): dS
  void* grad_z;      // acc (B, H, D): what is added to v·dSᵀ in dφ(k): dz; for softmax −Σ dS·S
};

// One instruction set's kernels. Each does the items [begin, end) of its pass; items are independent, and what one
// computes depends on nothing but its own head, so neither threads nor batch change a bit.
struct LinearAttentionKernels {
  using Pass = void (*)(const LinearAttention&, int64_t begin, int64_t end);
  Pass key_pass;               // item = head · key_splits + split
  Pass key_reduce;             // item = head
  Pass query_pass;             // item = head · query_splits + split
  Pass query_backward;         // item = head · query_splits + split; writes grad_q and partial (z, S)
  Pass query_backward_reduce;  // item = head
  Pass key_backward;           // item = head · key_splits + split
};

}  // namespace cxv
