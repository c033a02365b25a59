// What nystrom_attention's kernels are given: plain pointers and strides. Torch-free. "acc" is double for double and
// float otherwise. A gradient whose view has no data is not computed.
#pragma once

#include "view.h"

namespace cxv {

// Means of `landmarks` segments of tokens, or, backward, their gradient spread over the tokens.
struct NystromMeansParams {
  DType dtype;
  int64_t batch, heads, tokens, landmarks, dim;
  View x;      // (B, H, tokens, dim); backward: its gradient, written
  View means;  // acc (B, H, landmarks, dim); backward: its gradient, read
};

// Attention between a head's tokens and its landmarks, with the logits D^-½ x meansᵀ. Read-out: x = q, each token's
// softmax is over the landmarks, token_values = softmax · landmark_values. Summary: x = k, each landmark's softmax is
// over the tokens, landmark_values = softmaxᵀ · token_values.
struct NystromTokensParams {
  DType dtype;
  int64_t batch, heads, tokens, landmarks, dim, value_dim;
  View x;                              // (B, H, tokens, dim)
  View means;                          // acc (B, H, landmarks, dim)
  View token_values, landmark_values;  // (B, H, tokens or landmarks, value_dim)
  View grad_x, grad_means, grad_token_values, grad_landmark_values;
  void* log_sums;  // acc, heads in all × landmarks: the summary's log Σ e^logit
  int64_t tiles;   // of a head
};

// X = A⁺ Y with A = softmax(D^-½ q̃ k̃ᵀ), and its gradients.
struct NystromMixParams {
  DType dtype;  // of Y and X
  int64_t batch, heads, landmarks, dim, value_dim;
  View q, k;  // acc (B, H, landmarks, dim)
  View y, x;  // (B, H, landmarks, value_dim)
  View grad_x, grad_q, grad_k, grad_y;
};

// out = attention + the convolution of v along the tokens with its head's weight, and its gradients.
struct NystromResidualParams {
  DType dtype;
  int64_t batch, heads, tokens, value_dim, kernel;
  View attention, v, out;  // (B, H, tokens, value_dim)
  View weight;             // (H, 1, kernel, 1)
  View grad_out, grad_v, grad_weight;
  int64_t tiles;  // of a head
  void* partial;  // acc, heads in all × tiles × kernel: the tiles' shares of the weight's gradient
};

}  // namespace cxv
