// The parameters of a linear-attention kernel. Torch-free.
#pragma once

#include "view.h"

namespace cxv {

// Three maps are functions of the projection x·Wᵀ: FAVOR+ with the constant eps added to φ, the original FAVOR+
// (eps = 0), and relu with eps added. kElu is φ itself, for kv_state. kEluExact, for linear_attention, keeps S / z and
// log z, which do not underflow.
enum class FeatureMap { kSoftmax, kElu, kRelu, kFavor, kFavorExact, kFavorRelu, kEluExact };

// What an op asks of a device. kState computes only state and key_stat, for kv_state.
enum class Call { kForward, kBackward, kState, kStateBackward, kFeaturesMax, kFeaturesForward, kFeaturesBackward };

// Of linear_attention, kv_state, performer_attention and performer_features. Accumulators ("acc") are double for double
// and float otherwise, contiguous, one block per head.
struct LinearAttentionParams {
  DType dtype;
  FeatureMap feature_map;
  double eps;  // kRelu: added to the denominator; kFavor, kFavorRelu: to each feature
  int64_t batch, heads, queries, keys, dim, value_dim;
  View q, k, v, out;               // performer_features: q is x, out φ
  const bool* key_mask = nullptr;  // (B, keys) or null
  int64_t mask_stride[2] = {0, 0};

  int64_t key_splits, query_splits;  // of a head's tokens: their partial sums are added in order
  void* state;                       // acc (B, H, M, E): S; for softmax and the exact maps divided by z
  void* key_stat;                    // acc (B, H, M): z; for softmax and the exact maps log z, +∞ where z is 0

  // Backward. A gradient whose view has no data is not computed, and without grad_k and grad_v neither are dS and dz.
  View grad_out, grad_q, grad_k, grad_v;
  void* grad_state;  // acc (B, H, M, E): dS
  void* grad_z;      // acc (B, H, M): what is added to v·dSᵀ in dφ(k): dz; where S is normalized dL − Σ dS·S

  // Random features; M is D without a projection.
  int64_t features;
  const void* projection = nullptr;  // acc (M, D)
  void* key_max = nullptr;           // acc (B, H): what kFavor shifts the keys' exponents by; null: φ of queries
};

// Whether a gradient of the keys or their values is computed. Static: each instruction set's file has its own code.
static inline bool has_key_gradients(const LinearAttentionParams& p) {
  return p.grad_k.data != nullptr || p.grad_v.data != nullptr;
}

}  // namespace cxv
