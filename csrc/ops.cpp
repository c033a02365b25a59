// Every schema, once. Kernels register under their dispatch key in csrc/cpu and csrc/cuda; fake implementations and
// autograd are in Python, in the op's folder.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cxv_kernels, m) {
  // q (B, H, N_q, D), k (B, H, N_k, D), v (B, H, N_k, E); key_mask bool (B, N_k); feature_map softmax | elu | relu.
  // out (B, H, N_q, E); state (B, H, D, E) and key_stat (B, H, D) in float32, or float64 for float64 inputs.
  m.def(
      "linear_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? key_mask, str feature_map, float eps)"
      " -> (Tensor out, Tensor state, Tensor key_stat)");
  m.def(
      "linear_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor state,"
      " Tensor key_stat, str feature_map, float eps) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");

  // What Nyström attention has beyond scaled-dot-product attention. x (B, H, N, D); means (B, H, m, D) in float32, or
  // float64 for float64. summary and mixed (B, H, m, E), mixed = softmax(D^-½ q_means k_meansᵀ)⁺ summary.
  m.def("nystrom_means(Tensor x, int landmarks) -> Tensor means");
  m.def("nystrom_means_backward(Tensor grad_means, Tensor x) -> Tensor grad_x");
  m.def("nystrom_mix(Tensor q_means, Tensor k_means, Tensor summary) -> Tensor mixed");
  m.def(
      "nystrom_mix_backward(Tensor grad_mixed, Tensor q_means, Tensor k_means, Tensor summary)"
      " -> (Tensor grad_q_means, Tensor grad_k_means, Tensor grad_summary)");
  // attention + the convolution along N of v (B, H, N, E) with weight (H, 1, K, 1), K odd.
  m.def("nystrom_residual(Tensor attention, Tensor v, Tensor weight) -> Tensor out");
  m.def(
      "nystrom_residual_backward(Tensor grad_out, Tensor v, Tensor weight)"
      " -> (Tensor grad_v, Tensor grad_weight)");
}
