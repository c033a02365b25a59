// Every schema, once. Kernels register under their dispatch key in csrc/cpu and csrc/cuda; fake implementations and
// autograd are in Python, in the op's folder.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cxv_kernels, m) {
  // q (B, H, N_q, D), k (B, H, N_k, D), v (B, H, N_k, E); key_mask bool (B, N_k); feature_map softmax | elu | relu.
  // out (B, H, N_q, E); state (B, H, D, E) and key_stat (B, H, D) in float32, or float64 for float64 inputs.
  m.def(
      "linear_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? key_mask, str feature_map, float eps)"
      " -> (Tensor out, Tensor state, Tensor key_stat)");
  // Here and below, needed: the gradients that are wanted, in the order of the results; the others have shape (0).
  m.def(
      "linear_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor state,"
      " Tensor key_stat, str feature_map, float eps, bool[3] needed)"
      " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  // Only the state and key_stat of linear_attention.
  m.def("kv_state_forward(Tensor k, Tensor v, Tensor? key_mask, str feature_map) -> (Tensor state, Tensor key_stat)");
  // grad_z is added to v·grad_stateᵀ in the gradient of φ(k).
  m.def(
      "kv_state_backward(Tensor grad_state, Tensor grad_z, Tensor k, Tensor v, Tensor? key_mask, Tensor key_stat,"
      " str feature_map, bool[2] needed) -> (Tensor grad_k, Tensor grad_v)");

  // projection (M, D) in the dtype of state; kernel softmax | relu. As above with M for D; key_max (B, H).
  m.def(
      "performer_attention_forward(Tensor q, Tensor k, Tensor v, Tensor projection, Tensor? key_mask, str kernel,"
      " float eps) -> (Tensor out, Tensor state, Tensor key_stat, Tensor key_max)");
  m.def(
      "performer_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor projection,"
      " Tensor? key_mask, Tensor state, Tensor key_stat, Tensor key_max, str kernel, float eps, bool[3] needed)"
      " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  // x (B, H, N, D) → phi (B, H, N, M).
  m.def(
      "performer_features_forward(Tensor x, Tensor projection, bool is_query, str kernel, float eps)"
      " -> (Tensor phi, Tensor key_max)");
  m.def(
      "performer_features_backward(Tensor grad_phi, Tensor x, Tensor projection, Tensor key_max, bool is_query,"
      " str kernel, float eps) -> Tensor");

  // x and residual contiguous, of one shape and dtype; seed one int64; element i is element offset + i of the mask.
  m.def("dropout(Tensor x, Tensor? residual, Tensor seed, float p, int offset) -> Tensor");
  // The dropout of GELU(x), and its gradient.
  m.def("gelu_dropout_forward(Tensor x, Tensor seed, float p, int offset) -> Tensor");
  m.def("gelu_dropout_backward(Tensor grad_out, Tensor x, Tensor seed, float p, int offset) -> Tensor");

  // x (B, C_in, H, W), weight (C_out, C_in, 3, 3), bias (C_out) in x's dtype; gamma, beta (C_out) and rstd (B, H, W) in
  // float32, or float64 for float64 inputs. out (B, C_out, H, W) has the memory format of the convolution's output.
  m.def(
      "conv_norm_forward(Tensor x, Tensor weight, Tensor? bias, Tensor gamma, Tensor beta, float eps)"
      " -> (Tensor out, Tensor rstd)");
  m.def(
      "conv_norm_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, Tensor out, Tensor rstd,"
      " Tensor gamma, Tensor beta, float eps, bool[5] needed) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias,"
      " Tensor grad_gamma, Tensor grad_beta)");

  // Nyström attention. x, q, k (B, H, N, D), v (B, H, N, E); means (B, H, m, D) and log_sums (B, H, m) in float32, or
  // float64 for float64; the logits are D^-½ times the products. summary = softmax(q_means kᵀ) v (B, H, m, E),
  // mixed = softmax(q_means k_meansᵀ)⁺ summary, out = softmax(q k_meansᵀ) mixed.
  m.def("nystrom_means(Tensor x, int landmarks) -> Tensor means");
  m.def("nystrom_means_backward(Tensor grad_means, Tensor x) -> Tensor grad_x");
  m.def("nystrom_summary(Tensor q_means, Tensor k, Tensor v) -> (Tensor summary, Tensor log_sums)");
  m.def(
      "nystrom_summary_backward(Tensor grad_summary, Tensor q_means, Tensor k, Tensor v, Tensor summary, Tensor"
      " log_sums, bool[3] needed) -> (Tensor grad_q_means, Tensor grad_k, Tensor grad_v)");
  m.def("nystrom_readout(Tensor q, Tensor k_means, Tensor mixed) -> Tensor out");
  m.def(
      "nystrom_readout_backward(Tensor grad_out, Tensor q, Tensor k_means, Tensor mixed, bool[3] needed)"
      " -> (Tensor grad_q, Tensor grad_k_means, Tensor grad_mixed)");
  m.def("nystrom_mix(Tensor q_means, Tensor k_means, Tensor summary) -> Tensor mixed");
  m.def(
      "nystrom_mix_backward(Tensor grad_mixed, Tensor q_means, Tensor k_means, Tensor summary, bool[3] needed)"
      " -> (Tensor grad_q_means, Tensor grad_k_means, Tensor grad_summary)");
  // attention + the convolution along N of v (B, H, N, E) with weight (H, 1, K, 1), K odd.
  m.def("nystrom_residual(Tensor attention, Tensor v, Tensor weight) -> Tensor out");
  m.def(
      "nystrom_residual_backward(Tensor grad_out, Tensor v, Tensor weight, bool[2] needed)"
      " -> (Tensor grad_v, Tensor grad_weight)");

  // Lines of name=value: compiler, torch_target (the oldest that is supported), torch_built_with, cuda, cuda_arch_list
  // (both empty without CUDA, and cuda_missing says why), and cpu_isa: what the CPU kernels use here.
  m.def("build_info() -> str");
  // The compute capability, times 10, whose code of the CUDA library this GPU runs: 75 on a newer one that has no other
  // than sm_75's PTX; 0: none.
  m.def("cuda_compiled_for(int device) -> int");
}
