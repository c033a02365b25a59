// nystrom_attention on the CPU: checks, allocation and threads. On a GPU it is Triton's.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../cpu/parallel.h"

namespace cxv {
namespace {

using Tensors = std::tuple<Tensor, Tensor, Tensor>;

int64_t size_of(const char* name, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == 4, "cxv_kernels: ", name, " must have 4 dimensions, got ", t.dim());
  return t.size(dim);
}

// Parameters with the dtype and the sizes of t (B, H, tokens, dim or value_dim).
NystromParams params_of(const char* name, const Tensor& t) {
  NystromParams p = {};
  p.dtype = dtype_of(t);
  p.batch = size_of(name, t, 0);
  p.heads = t.size(1);
  p.tokens = t.size(2);
  p.dim = p.value_dim = t.size(3);
  return p;
}

// A tensor (B, H, rows, cols) in the dtype of `like`, or in that of its means.
View checked(const char* name, const Tensor& t, const Tensor& like, const NystromParams& p, int64_t rows, int64_t cols,
             bool means = false) {
  check(name, t, like, {p.batch, p.heads, rows, cols}, means ? accumulator_of(like) : like.scalar_type());
  return view(t);
}

int64_t heads(const NystromParams& p) { return p.batch * p.heads; }

NystromParams make_means(const Tensor& x, int64_t landmarks) {
  auto p = params_of("x", x);
  p.landmarks = landmarks;
  STD_TORCH_CHECK(landmarks >= 1 && landmarks <= p.tokens, "cxv_kernels: landmarks must be from 1 to the number of ",
                  "tokens ", p.tokens, ", got ", landmarks);
  return p;
}

Tensor means(Tensor x, int64_t landmarks) {
  auto p = make_means(x, landmarks);
  Tensor out = new_accumulator(x, {p.batch, p.heads, landmarks, p.dim});
  p.x = view(x);
  p.means = view(out);
  run_pass(kernels().means, p, 0, heads(p) * landmarks);
  return out;
}

Tensor means_backward(Tensor grad_means, Tensor x) {
  auto p = make_means(x, size_of("grad_means", grad_means, 2));
  p.means = checked("grad_means", grad_means, x, p, p.landmarks, p.dim, true);
  Tensor grad_x = new_like(x, {p.batch, p.heads, p.tokens, p.dim});
  p.x = view(grad_x);
  run_pass(kernels().means_backward, p, 0, heads(p) * p.landmarks);
  return grad_x;
}

// x (B, H, N, D), means (B, H, m, D), values (B, H, N or m, E).
NystromParams make_tokens(const Tensor& x, const Tensor& means, const char* name, const Tensor& values) {
  auto p = params_of("x", x);
  p.landmarks = size_of("means", means, 2);
  p.value_dim = size_of(name, values, 3);
  p.x = view(x);
  p.means = checked("means", means, x, p, p.landmarks, p.dim, true);
  p.tiles = (p.tokens + kTile - 1) / kTile;
  return p;
}

Tensor readout(Tensor q, Tensor k_means, Tensor mixed) {
  auto p = make_tokens(q, k_means, "mixed", mixed);
  p.landmark_values = checked("mixed", mixed, q, p, p.landmarks, p.value_dim);
  Tensor out = new_like(q, {p.batch, p.heads, p.tokens, p.value_dim});
  p.token_values = view(out);
  run_pass(kernels().readout, p, 0, heads(p) * p.tiles);
  return out;
}

Tensors readout_backward(Tensor grad_out, Tensor q, Tensor k_means, Tensor mixed, std::vector<bool> needed) {
  auto p = make_tokens(q, k_means, "mixed", mixed);
  p.landmark_values = checked("mixed", mixed, q, p, p.landmarks, p.value_dim);
  p.grad_token_values = checked("grad_out", grad_out, q, p, p.tokens, p.value_dim);
  const Tensors grads =
      new_gradients(needed, {{q, &p.grad_x}, {k_means, &p.grad_means}, {mixed, &p.grad_landmark_values}});
  run_pass(kernels().readout_backward, p, 0, heads(p));
  return grads;
}

NystromParams make_summary(const Tensor& q_means, const Tensor& k, const Tensor& v) {
  auto p = make_tokens(k, q_means, "v", v);
  p.token_values = checked("v", v, k, p, p.tokens, p.value_dim);
  return p;
}

std::tuple<Tensor, Tensor> summary(Tensor q_means, Tensor k, Tensor v) {
  auto p = make_summary(q_means, k, v);
  Tensor out = new_like(v, {p.batch, p.heads, p.landmarks, p.value_dim});
  Tensor log_sums = new_accumulator(k, {p.batch, p.heads, p.landmarks});
  p.landmark_values = view(out);
  p.log_sums = log_sums.data_ptr();
  run_pass(kernels().summary, p, 0, heads(p));
  return {out, log_sums};
}

Tensors summary_backward(Tensor grad_summary, Tensor q_means, Tensor k, Tensor v, Tensor summary, Tensor log_sums,
                         std::vector<bool> needed) {
  auto p = make_summary(q_means, k, v);
  p.landmark_values = checked("summary", summary, k, p, p.landmarks, p.value_dim);
  p.grad_landmark_values = checked("grad_summary", grad_summary, k, p, p.landmarks, p.value_dim);
  p.log_sums = checked_data("log_sums", log_sums, k, {p.batch, p.heads, p.landmarks});
  const Tensors grads = new_gradients(needed, {{q_means, &p.grad_means}, {k, &p.grad_x}, {v, &p.grad_token_values}});
  run_pass(kernels().summary_backward, p, 0, heads(p));
  return grads;
}

NystromParams make_mix(const Tensor& q_means, const Tensor& k_means, const Tensor& summary) {
  auto p = params_of("q_means", q_means);
  p.dtype = dtype_of(summary, "summary");
  p.landmarks = p.tokens;
  p.value_dim = size_of("summary", summary, 3);
  p.means = checked("q_means", q_means, summary, p, p.landmarks, p.dim, true);
  p.k_means = checked("k_means", k_means, summary, p, p.landmarks, p.dim, true);
  p.landmark_values = checked("summary", summary, summary, p, p.landmarks, p.value_dim);
  return p;
}

Tensor mix(Tensor q_means, Tensor k_means, Tensor summary) {
  auto p = make_mix(q_means, k_means, summary);
  Tensor out = new_like(summary, {p.batch, p.heads, p.landmarks, p.value_dim});
  p.mixed = view(out);
  run_pass(kernels().mix, p, 0, heads(p));
  return out;
}

Tensors mix_backward(Tensor grad_mixed, Tensor q_means, Tensor k_means, Tensor summary, std::vector<bool> needed) {
  auto p = make_mix(q_means, k_means, summary);
  p.mix_backward = true;
  p.grad_mixed = checked("grad_mixed", grad_mixed, summary, p, p.landmarks, p.value_dim);
  const Tensors grads =
      new_gradients(needed, {{q_means, &p.grad_means}, {k_means, &p.grad_k_means}, {summary, &p.grad_landmark_values}});
  run_pass(kernels().mix_backward, p, 0, heads(p));
  return grads;
}

NystromParams make_residual(const Tensor& v, const Tensor& weight) {
  auto p = params_of("v", v);
  p.kernel = size_of("weight", weight, 2);
  STD_TORCH_CHECK(p.kernel % 2 == 1, "cxv_kernels: weight must have an odd size in dimension 2, got ", p.kernel);
  check("weight", weight, v, {p.heads, 1, p.kernel, 1}, v.scalar_type());
  p.token_values = view(v);
  p.weight = view(weight);
  p.tiles = (p.tokens + kResidualTile - 1) / kResidualTile;
  return p;
}

Tensor residual(Tensor attention, Tensor v, Tensor weight) {
  auto p = make_residual(v, weight);
  p.attention = checked("attention", attention, v, p, p.tokens, p.value_dim);
  Tensor out = new_like(attention, {p.batch, p.heads, p.tokens, p.value_dim});
  p.out = view(out);
  run_pass(kernels().residual, p, 0, heads(p) * p.tiles);
  return out;
}

std::tuple<Tensor, Tensor> residual_backward(Tensor grad_out, Tensor v, Tensor weight, std::vector<bool> needed) {
  auto p = make_residual(v, weight);
  p.grad_out = checked("grad_out", grad_out, v, p, p.tokens, p.value_dim);
  const std::tuple<Tensor, Tensor> grads = new_gradients(needed, {{v, &p.grad_token_values}, {weight, &p.grad_weight}});
  Tensor partial = new_accumulator(v, {needed[1] ? heads(p) * p.tiles : 0, p.kernel});
  p.partial = partial.data_ptr();
  run_pass(kernels().residual_backward, p, 0, heads(p) * p.tiles);
  if (needed[1]) run_pass(kernels().residual_weight_backward, p, 0, p.heads);
  return grads;
}

}  // namespace
}  // namespace cxv

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CPU, m) {
  m.impl("nystrom_means", TORCH_BOX(&cxv::means));
  m.impl("nystrom_means_backward", TORCH_BOX(&cxv::means_backward));
  m.impl("nystrom_summary", TORCH_BOX(&cxv::summary));
  m.impl("nystrom_summary_backward", TORCH_BOX(&cxv::summary_backward));
  m.impl("nystrom_readout", TORCH_BOX(&cxv::readout));
  m.impl("nystrom_readout_backward", TORCH_BOX(&cxv::readout_backward));
  m.impl("nystrom_mix", TORCH_BOX(&cxv::mix));
  m.impl("nystrom_mix_backward", TORCH_BOX(&cxv::mix_backward));
  m.impl("nystrom_residual", TORCH_BOX(&cxv::residual));
  m.impl("nystrom_residual_backward", TORCH_BOX(&cxv::residual_backward));
}
