// nystrom_attention on the CPU: checks, memory and threads. The arithmetic is in nystrom_attention_kernel.h.
#include "../include/nystrom_attention.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../tensor.h"
#include "kernels.h"

namespace {

using cxv::check;
using torch::stable::Tensor;

const cxv::NystromAttentionKernels& passes() { return cxv::kernels().nystrom_attention; }

template <class P>
void run(cxv::NystromAttentionKernels::Pass<P> pass, const P& p, int64_t items) {
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) { pass(p, begin, end); });
}

void check_four(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, "cxv_kernels: ", name, " must have 4 dimensions, got ", t.dim());
}

cxv::NystromMeans describe_means(const Tensor& x, int64_t landmarks) {
  cxv::NystromMeans p = {};
  p.dtype = cxv::dtype_of(x);
  p.batch = x.size(0);
  p.heads = x.size(1);
  p.tokens = x.size(2);
  p.landmarks = landmarks;
  p.dim = x.size(3);
  STD_TORCH_CHECK(landmarks >= 1 && landmarks <= p.tokens, "cxv_kernels: landmarks must be from 1 to the number of ",
                  "tokens ", p.tokens, ", got ", landmarks);
  return p;
}

Tensor means(Tensor x, int64_t landmarks) {
  check_four("x", x);
  auto p = describe_means(x, landmarks);
  Tensor out = cxv::new_accumulator(x, {p.batch, p.heads, landmarks, p.dim});
  p.x = cxv::view(x);
  p.means = cxv::view(out);
  run(passes().means, p, p.batch * p.heads * landmarks);
  return out;
}

Tensor means_backward(Tensor grad_means, Tensor x) {
  check_four("x", x);
  check_four("grad_means", grad_means);
  auto p = describe_means(x, grad_means.size(2));
  check("grad_means", grad_means, x, {p.batch, p.heads, p.landmarks, p.dim}, cxv::accumulator_of(x));
  Tensor grad_x = cxv::new_like(x, {p.batch, p.heads, p.tokens, p.dim});
  p.x = cxv::view(grad_x);
  p.means = cxv::view(grad_means);
  run(passes().spread, p, p.batch * p.heads * p.landmarks);
  return grad_x;
}

// x (B, H, N, dim), means (B, H, m, dim), and the values' width.
cxv::NystromTokens describe_tokens(const Tensor& x, const Tensor& means, int64_t value_dim) {
  check_four("x", x);
  check_four("means", means);
  cxv::NystromTokens p = {};
  p.dtype = cxv::dtype_of(x);
  p.batch = x.size(0);
  p.heads = x.size(1);
  p.tokens = x.size(2);
  p.landmarks = means.size(2);
  p.dim = x.size(3);
  p.value_dim = value_dim;
  check("means", means, x, {p.batch, p.heads, p.landmarks, p.dim}, cxv::accumulator_of(x));
  p.x = cxv::view(x);
  p.means = cxv::view(means);
  p.tiles = (p.tokens + passes().tile - 1) / passes().tile;
  return p;
}

cxv::View checked(const char* name, const Tensor& t, const Tensor& x, const cxv::NystromTokens& p, int64_t rows) {
  check(name, t, x, {p.batch, p.heads, rows, p.value_dim}, x.scalar_type());
  return cxv::view(t);
}

Tensor readout(Tensor q, Tensor k_means, Tensor mixed) {
  check_four("mixed", mixed);
  auto p = describe_tokens(q, k_means, mixed.size(3));
  p.landmark_values = checked("mixed", mixed, q, p, p.landmarks);
  Tensor out = cxv::new_like(q, {p.batch, p.heads, p.tokens, p.value_dim});
  p.token_values = cxv::view(out);
  run(passes().readout, p, p.batch * p.heads * p.tiles);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> readout_backward(Tensor grad_out, Tensor q, Tensor k_means, Tensor mixed,
                                                    std::vector<bool> needed) {
  cxv::check_needed(needed, 3);
  check_four("mixed", mixed);
  auto p = describe_tokens(q, k_means, mixed.size(3));
  p.landmark_values = checked("mixed", mixed, q, p, p.landmarks);
  p.grad_token_values = checked("grad_out", grad_out, q, p, p.tokens);
  const auto grad_q = cxv::new_gradient(q, needed[0]), grad_k_means = cxv::new_gradient(k_means, needed[1]);
  const auto grad_mixed = cxv::new_gradient(mixed, needed[2]);
  p.grad_x = grad_q.view;
  p.grad_means = grad_k_means.view;
  p.grad_landmark_values = grad_mixed.view;
  run(passes().readout_backward, p, p.batch * p.heads);
  return {grad_q.tensor, grad_k_means.tensor, grad_mixed.tensor};
}

std::tuple<Tensor, Tensor> summary(Tensor q_means, Tensor k, Tensor v) {
  check_four("v", v);
  auto p = describe_tokens(k, q_means, v.size(3));
  p.token_values = checked("v", v, k, p, p.tokens);
  Tensor out = cxv::new_like(v, {p.batch, p.heads, p.landmarks, p.value_dim});
  Tensor log_sums = cxv::new_accumulator(k, {p.batch, p.heads, p.landmarks});
  p.landmark_values = cxv::view(out);
  p.log_sums = log_sums.data_ptr();
  run(passes().summary, p, p.batch * p.heads);
  return {out, log_sums};
}

std::tuple<Tensor, Tensor, Tensor> summary_backward(Tensor grad_summary, Tensor q_means, Tensor k, Tensor v,
                                                    Tensor summary, Tensor log_sums, std::vector<bool> needed) {
  cxv::check_needed(needed, 3);
  check_four("v", v);
  auto p = describe_tokens(k, q_means, v.size(3));
  p.token_values = checked("v", v, k, p, p.tokens);
  p.landmark_values = checked("summary", summary, k, p, p.landmarks);
  p.grad_landmark_values = checked("grad_summary", grad_summary, k, p, p.landmarks);
  cxv::check_accumulator("log_sums", log_sums, k, {p.batch, p.heads, p.landmarks});
  STD_TORCH_CHECK(log_sums.is_contiguous(), "cxv_kernels: log_sums must be contiguous");
  p.log_sums = log_sums.data_ptr();
  const auto grad_q_means = cxv::new_gradient(q_means, needed[0]);
  const auto grad_k = cxv::new_gradient(k, needed[1]), grad_v = cxv::new_gradient(v, needed[2]);
  p.grad_means = grad_q_means.view;
  p.grad_x = grad_k.view;
  p.grad_token_values = grad_v.view;
  run(passes().summary_backward, p, p.batch * p.heads);
  return {grad_q_means.tensor, grad_k.tensor, grad_v.tensor};
}

cxv::NystromMix describe_mix(const Tensor& q_means, const Tensor& k_means, const Tensor& summary) {
  check_four("q_means", q_means);
  check_four("summary", summary);
  cxv::NystromMix p = {};
  p.dtype = cxv::dtype_of(summary);
  p.batch = q_means.size(0);
  p.heads = q_means.size(1);
  p.landmarks = q_means.size(2);
  p.dim = q_means.size(3);
  p.value_dim = summary.size(3);
  const auto accumulator = cxv::accumulator_of(summary);
  check("q_means", q_means, summary, {p.batch, p.heads, p.landmarks, p.dim}, accumulator);
  check("k_means", k_means, summary, {p.batch, p.heads, p.landmarks, p.dim}, accumulator);
  check("summary", summary, q_means, {p.batch, p.heads, p.landmarks, p.value_dim}, summary.scalar_type());
  p.q = cxv::view(q_means);
  p.k = cxv::view(k_means);
  p.y = cxv::view(summary);
  return p;
}

Tensor mix(Tensor q_means, Tensor k_means, Tensor summary) {
  auto p = describe_mix(q_means, k_means, summary);
  Tensor out = cxv::new_like(summary, {p.batch, p.heads, p.landmarks, p.value_dim});
  p.x = cxv::view(out);
  run(passes().mix, p, p.batch * p.heads);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> mix_backward(Tensor grad_mixed, Tensor q_means, Tensor k_means, Tensor summary,
                                                std::vector<bool> needed) {
  cxv::check_needed(needed, 3);
  auto p = describe_mix(q_means, k_means, summary);
  check("grad_mixed", grad_mixed, summary, {p.batch, p.heads, p.landmarks, p.value_dim}, summary.scalar_type());
  const auto grad_q = cxv::new_gradient(q_means, needed[0]), grad_k = cxv::new_gradient(k_means, needed[1]);
  const auto grad_summary = cxv::new_gradient(summary, needed[2]);
  p.grad_x = cxv::view(grad_mixed);
  p.grad_q = grad_q.view;
  p.grad_k = grad_k.view;
  p.grad_y = grad_summary.view;
  run(passes().mix_backward, p, p.batch * p.heads);
  return {grad_q.tensor, grad_k.tensor, grad_summary.tensor};
}

cxv::NystromResidual describe_residual(const Tensor& v, const Tensor& weight) {
  check_four("v", v);
  check_four("weight", weight);
  cxv::NystromResidual p = {};
  p.dtype = cxv::dtype_of(v);
  p.batch = v.size(0);
  p.heads = v.size(1);
  p.tokens = v.size(2);
  p.value_dim = v.size(3);
  p.kernel = weight.size(2);
  STD_TORCH_CHECK(p.kernel % 2 == 1, "cxv_kernels: weight must have an odd size in dimension 2, got ", p.kernel);
  check("weight", weight, v, {p.heads, 1, p.kernel, 1}, v.scalar_type());
  p.v = cxv::view(v);
  p.weight = cxv::view(weight);
  p.tiles = (p.tokens + passes().residual_tile - 1) / passes().residual_tile;
  return p;
}

Tensor residual(Tensor attention, Tensor v, Tensor weight) {
  auto p = describe_residual(v, weight);
  check("attention", attention, v, {p.batch, p.heads, p.tokens, p.value_dim}, v.scalar_type());
  Tensor out = cxv::new_like(attention, {p.batch, p.heads, p.tokens, p.value_dim});
  p.attention = cxv::view(attention);
  p.out = cxv::view(out);
  run(passes().residual, p, p.batch * p.heads * p.tiles);
  return out;
}

std::tuple<Tensor, Tensor> residual_backward(Tensor grad_out, Tensor v, Tensor weight, std::vector<bool> needed) {
  cxv::check_needed(needed, 2);
  auto p = describe_residual(v, weight);
  check("grad_out", grad_out, v, {p.batch, p.heads, p.tokens, p.value_dim}, v.scalar_type());
  const auto grad_v = cxv::new_gradient(v, needed[0]), grad_weight = cxv::new_gradient(weight, needed[1]);
  Tensor partial = cxv::new_accumulator(v, {needed[1] ? p.batch * p.heads * p.tiles : 0, p.kernel});
  p.grad_out = cxv::view(grad_out);
  p.grad_v = grad_v.view;
  p.grad_weight = grad_weight.view;
  p.partial = partial.data_ptr();
  run(passes().residual_backward, p, p.batch * p.heads * p.tiles);
  if (needed[1]) run(passes().residual_weight_backward, p, p.heads);
  return {grad_v.tensor, grad_weight.tensor};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CPU, m) {
  m.impl("nystrom_means", TORCH_BOX(&means));
  m.impl("nystrom_means_backward", TORCH_BOX(&means_backward));
  m.impl("nystrom_summary", TORCH_BOX(&summary));
  m.impl("nystrom_summary_backward", TORCH_BOX(&summary_backward));
  m.impl("nystrom_readout", TORCH_BOX(&readout));
  m.impl("nystrom_readout_backward", TORCH_BOX(&readout_backward));
  m.impl("nystrom_mix", TORCH_BOX(&mix));
  m.impl("nystrom_mix_backward", TORCH_BOX(&mix_backward));
  m.impl("nystrom_residual", TORCH_BOX(&residual));
  m.impl("nystrom_residual_backward", TORCH_BOX(&residual_backward));
}
