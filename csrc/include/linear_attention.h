// What a linear-attention kernel is told. Torch-free.
#pragma once

#include "view.h"

namespace cxv {

// Three are functions of the projection x·Wᵀ: FAVOR+ with the constant eps added to φ, FAVOR+ proper (eps = 0), and
// relu with eps added. kElu is φ itself, for kv_state; kEluExact, for linear_attention, keeps S / z and log z, which
// no key underflows.
enum class FeatureMap { kSoftmax, kElu, kRelu, kFavor, kFavorExact, kFavorRelu, kEluExact };

// Accumulators ("acc") are double for double and float otherwise, contiguous, one block per head.
struct LinearAttention {
  DType dtype;
  FeatureMap feature_map;
  double eps;  // kRelu: added to the denominator; kFavor, kFavorRelu: to each feature
  int64_t batch, heads, queries, keys, dim, value_dim;
  View q, k, v, out;
  const bool* key_mask = nullptr;  // (B, keys) or null
  int64_t mask_stride[2] = {0, 0};

  // The key pass folds `splits` runs of tokens of a head into partial states, which are added in order.
  int64_t key_splits, query_splits;
  void* partial;   // acc, one block per item of the pass that writes it
  void* state;     // acc (B, H, M, E): S; for softmax and the exact maps divided by z
  void* key_stat;  // acc (B, H, M): z; for softmax and the exact maps log z, +∞ where z is 0

  // Backward. A gradient whose view has no data is not computed, and without grad_k and grad_v neither are dS and dz.
  View grad_out, grad_q, grad_k, grad_v;
  void* grad_state;  // acc (B, H, M, E): dS
  void* grad_z;      // acc (B, H, M): what is added to v·dSᵀ in dφ(k): dz; where S is normalized dL − Σ dS·S

  // Random features; M is D without a projection.
  int64_t features;
  const void* projection = nullptr;  // acc (M, D)
  void* key_max = nullptr;           // acc (B, H): what kFavor shifts the keys' exponents by
  // CPU: only the items [wave_begin, wave_end) of a pass have a block in `partial` at a time.
  int64_t wave_begin = 0, wave_end = 0;
  void* running = nullptr;  // acc, heads × (M + E + 1): the maxima, Σ v and the number of keys so far
  // CUDA: blocks that the card runs at a time. It changes how tokens are dealt out, but no bit.
  int64_t resident_blocks = 1;
};

// Whether a gradient of the keys or their values is computed. Static: each instruction set's file has its own code.
static inline bool has_key_gradients(const LinearAttention& p) {
  return p.grad_k.data != nullptr || p.grad_v.data != nullptr;
}

// One instruction set's kernels. Each does the items [begin, end) of its pass; items are independent, and what one
// computes depends on nothing but its own head, so neither threads nor batch change a bit.
struct LinearAttentionKernels {
  using Pass = void (*)(const LinearAttention&, int64_t begin, int64_t end);
  Pass key_pass;             // item = head · key_splits + split; writes a partial state
  Pass key_fold;             // item = head; adds the wave's partial states
  Pass query_pass;           // item = head · query_splits + split
  Pass query_backward;       // item = head · query_splits + split; writes grad_q and, for the keys, a partial (dz, dS)
  Pass query_backward_fold;  // item = head
  Pass key_backward;         // item = head · key_splits + split
  Pass features_max;         // item = head · query_splits + split of q; writes the largest exponent
  Pass features_forward;     // item = head · query_splits + split: φ(q) into out
  Pass features_backward;    // item = head · query_splits + split: grad_q of φ(q)
  int64_t (*key_partial)(const LinearAttention&);    // the size of a block of key_pass
  int64_t (*query_partial)(const LinearAttention&);  // of query_backward
};

}  // namespace cxv
