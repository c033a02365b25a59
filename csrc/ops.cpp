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

  // x (B, C_in, H, W), weight (C_out, C_in, 3, 3), bias (C_out) in x's dtype; gamma, beta (C_out) and rstd (B, H, W) in
  // float32, or float64 for float64 inputs. out (B, C_out, H, W) lies in memory as the convolution's output does.
  m.def(
      "conv_norm_forward(Tensor x, Tensor weight, Tensor? bias, Tensor gamma, Tensor beta, float eps)"
      " -> (Tensor out, Tensor rstd)");
  // needed: the gradients that are wanted, in the order of the results; the others come back empty, (0).
  m.def(
      "conv_norm_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, Tensor out, Tensor rstd,"
      " Tensor gamma, Tensor beta, float eps, bool[5] needed) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias,"
      " Tensor grad_gamma, Tensor grad_beta)");
}
