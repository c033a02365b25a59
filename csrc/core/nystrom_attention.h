// What nystrom_attention's kernels are given: plain pointers and strides. Torch-free.
#pragma once

#include "view.h"

namespace cxv {

// A pass reads what its comment names. "acc" is double for double and float otherwise. A gradient whose view has no
// data is not computed.
struct NystromParams {
  DType dtype;
  int64_t batch, heads, tokens, landmarks, dim, value_dim;
  int64_t tiles;  // of a head's tokens

  // means: of `landmarks` segments of tokens. Backward, the means' gradient is spread over the tokens' gradient x.
  View x;      // (B, H, tokens, dim)
  View means;  // acc (B, H, landmarks, dim)

  // Attention between a head's tokens and its landmarks, with the logits D^-½ x meansᵀ. readout: x = q, each token's
  // softmax is over the landmarks, token_values = softmax · landmark_values. summary: x = k, each landmark's softmax is
  // over the tokens, landmark_values = softmaxᵀ · token_values.
  View token_values, landmark_values;  // (B, H, tokens or landmarks, value_dim)
  View grad_x, grad_means, grad_token_values, grad_landmark_values;
  void* log_sums;  // acc, heads in all × landmarks: the summary's log Σ e^logit

  // mix: mixed = A⁺ landmark_values with A = softmax(D^-½ means k_meansᵀ), and its gradients.
  bool mix_backward;
  View k_means;  // acc (B, H, landmarks, dim)
  View mixed;    // (B, H, landmarks, value_dim)
  View grad_mixed, grad_k_means;

  // residual: out = attention + the convolution of v = token_values along the tokens with its head's weight.
  int64_t kernel;
  View attention, out;  // (B, H, tokens, value_dim)
  View weight;          // (H, 1, kernel, 1)
  View grad_out, grad_weight;
  void* partial;  // acc, heads in all × tiles × kernel: the tiles' shares of the weight's gradient
};

}  // namespace cxv
