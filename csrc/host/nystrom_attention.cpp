// nystrom_attention on the CPU: checks, allocation and threads. On a GPU it is Triton's.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../core/tensor.h"
#include "../cpu/isa/kernels.h"

namespace cxv {
namespace {

const NystromAttentionKernels& passes() { return kernels().nystrom_attention; }

template <class P>
void run(NystromAttentionKernels::Pass<P> pass, const P& p, int64_t items) {
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) { pass(p, begin, end); });
}

void check_four(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, "cxv_kernels: ", name, " must have 4 dimensions, got ", t.dim());
}

NystromMeansParams make_means(const Tensor& x, int64_t landmarks) {
  NystromMeansParams p = {};
  p.dtype = dtype_of(x);
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
  auto p = make_means(x, landmarks);
  Tensor out = new_accumulator(x, {p.batch, p.heads, landmarks, p.dim});
  p.x = view(x);
  p.means = view(out);
  run(passes().means, p, p.batch * p.heads * landmarks);
  return out;
}

Tensor means_backward(Tensor grad_means, Tensor x) {
  check_four("x", x);
  check_four("grad_means", grad_means);
  auto p = make_means(x, grad_means.size(2));
  check("grad_means", grad_means, x, {p.batch, p.heads, p.landmarks, p.dim}, accumulator_of(x));
  Tensor grad_x = new_like(x, {p.batch, p.heads, p.tokens, p.dim});
  p.x = view(grad_x);
  p.means = view(grad_means);
  run(passes().spread, p, p.batch * p.heads * p.landmarks);
  return grad_x;
}

// x (B, H, N, dim), means (B, H, m, dim), and the values' width.
NystromTokensParams make_tokens(const Tensor& x, const Tensor& means, int64_t value_dim) {
  check_four("x", x);
  check_four("means", means);
  NystromTokensParams p = {};
  p.dtype = dtype_of(x);
  p.batch = x.size(0);
  p.heads = x.size(1);
  p.tokens = x.size(2);
  p.landmarks = means.size(2);
  p.dim = x.size(3);
  p.value_dim = value_dim;
  check("means", means, x, {p.batch, p.heads, p.landmarks, p.dim}, accumulator_of(x));
  p.x = view(x);
  p.means = view(means);
  p.tiles = (p.tokens + passes().tile - 1) / passes().tile;
  return p;
}

View checked(const char* name, const Tensor& t, const Tensor& x, const NystromTokensParams& p, int64_t rows) {
  check(name, t, x, {p.batch, p.heads, rows, p.value_dim}, x.scalar_type());
  return view(t);
}

Tensor readout(Tensor q, Tensor k_means, Tensor mixed) {
  check_four("mixed", mixed);
  auto p = make_tokens(q, k_means, mixed.size(3));
  p.landmark_values = checked("mixed", mixed, q, p, p.landmarks);
  Tensor out = new_like(q, {p.batch, p.heads, p.tokens, p.value_dim});
  p.token_values = view(out);
  run(passes().readout, p, p.batch * p.heads * p.tiles);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> readout_backward(Tensor grad_out, Tensor q, Tensor k_means, Tensor mixed,
                                                    std::vector<bool> needed) {
  check_needed(needed, 3);
  check_four("mixed", mixed);
  auto p = make_tokens(q, k_means, mixed.size(3));
  p.landmark_values = checked("mixed", mixed, q, p, p.landmarks);
  p.grad_token_values = checked("grad_out", grad_out, q, p, p.tokens);
  const auto grad_q = new_gradient(q, needed[0]), grad_k_means = new_gradient(k_means, needed[1]);
  const auto grad_mixed = new_gradient(mixed, needed[2]);
  p.grad_x = grad_q.view;
  p.grad_means = grad_k_means.view;
  p.grad_landmark_values = grad_mixed.view;
  run(passes().readout_backward, p, p.batch * p.heads);
  return {grad_q.tensor, grad_k_means.tensor, grad_mixed.tensor};
}

std::tuple<Tensor, Tensor> summary(Tensor q_means, Tensor k, Tensor v) {
  check_four("v", v);
  auto p = make_tokens(k, q_means, v.size(3));
  p.token_values = checked("v", v, k, p, p.tokens);
  Tensor out = new_like(v, {p.batch, p.heads, p.landmarks, p.value_dim});
  Tensor log_sums = new_accumulator(k, {p.batch, p.heads, p.landmarks});
  p.landmark_values = view(out);
  p.log_sums = log_sums.data_ptr();
  run(passes().summary, p, p.batch * p.heads);
  return {out, log_sums};
}

std::tuple<Tensor, Tensor, Tensor> summary_backward(Tensor grad_summary, Tensor q_means, Tensor k, Tensor v,
                                                    Tensor summary, Tensor log_sums, std::vector<bool> needed) {
  check_needed(needed, 3);
  check_four("v", v);
  auto p = make_tokens(k, q_means, v.size(3));
  p.token_values = checked("v", v, k, p, p.tokens);
  p.landmark_values = checked("summary", summary, k, p, p.landmarks);
  p.grad_landmark_values = checked("grad_summary", grad_summary, k, p, p.landmarks);
  p.log_sums = checked_data("log_sums", log_sums, k, {p.batch, p.heads, p.landmarks});
  const auto grad_q_means = new_gradient(q_means, needed[0]);
  const auto grad_k = new_gradient(k, needed[1]), grad_v = new_gradient(v, needed[2]);
  p.grad_means = grad_q_means.view;
  p.grad_x = grad_k.view;
  p.grad_token_values = grad_v.view;
  run(passes().summary_backward, p, p.batch * p.heads);
  return {grad_q_means.tensor, grad_k.tensor, grad_v.tensor};
}

NystromMixParams make_mix(const Tensor& q_means, const Tensor& k_means, const Tensor& summary) {
  check_four("q_means", q_means);
  check_four("summary", summary);
  NystromMixParams p = {};
  p.dtype = dtype_of(summary);
  p.batch = q_means.size(0);
  p.heads = q_means.size(1);
  p.landmarks = q_means.size(2);
  p.dim = q_means.size(3);
  p.value_dim = summary.size(3);
  const auto accumulator = accumulator_of(summary);
  check("q_means", q_means, summary, {p.batch, p.heads, p.landmarks, p.dim}, accumulator);
  check("k_means", k_means, summary, {p.batch, p.heads, p.landmarks, p.dim}, accumulator);
  check("summary", summary, q_means, {p.batch, p.heads, p.landmarks, p.value_dim}, summary.scalar_type());
  p.q = view(q_means);
  p.k = view(k_means);
  p.y = view(summary);
  return p;
}

Tensor mix(Tensor q_means, Tensor k_means, Tensor summary) {
  auto p = make_mix(q_means, k_means, summary);
  Tensor out = new_like(summary, {p.batch, p.heads, p.landmarks, p.value_dim});
  p.x = view(out);
  run(passes().mix, p, p.batch * p.heads);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> mix_backward(Tensor grad_mixed, Tensor q_means, Tensor k_means, Tensor summary,
                                                std::vector<bool> needed) {
  check_needed(needed, 3);
  auto p = make_mix(q_means, k_means, summary);
  check("grad_mixed", grad_mixed, summary, {p.batch, p.heads, p.landmarks, p.value_dim}, summary.scalar_type());
  const auto grad_q = new_gradient(q_means, needed[0]), grad_k = new_gradient(k_means, needed[1]);
  const auto grad_summary = new_gradient(summary, needed[2]);
  p.grad_x = view(grad_mixed);
  p.grad_q = grad_q.view;
  p.grad_k = grad_k.view;
  p.grad_y = grad_summary.view;
  run(passes().mix_backward, p, p.batch * p.heads);
  return {grad_q.tensor, grad_k.tensor, grad_summary.tensor};
}

NystromResidualParams make_residual(const Tensor& v, const Tensor& weight) {
  check_four("v", v);
  check_four("weight", weight);
  NystromResidualParams p = {};
  p.dtype = dtype_of(v);
  p.batch = v.size(0);
  p.heads = v.size(1);
  p.tokens = v.size(2);
  p.value_dim = v.size(3);
  p.kernel = weight.size(2);
  STD_TORCH_CHECK(p.kernel % 2 == 1, "cxv_kernels: weight must have an odd size in dimension 2, got ", p.kernel);
  check("weight", weight, v, {p.heads, 1, p.kernel, 1}, v.scalar_type());
  p.v = view(v);
  p.weight = view(weight);
  p.tiles = (p.tokens + passes().residual_tile - 1) / passes().residual_tile;
  return p;
}

Tensor residual(Tensor attention, Tensor v, Tensor weight) {
  auto p = make_residual(v, weight);
  check("attention", attention, v, {p.batch, p.heads, p.tokens, p.value_dim}, v.scalar_type());
  Tensor out = new_like(attention, {p.batch, p.heads, p.tokens, p.value_dim});
  p.attention = view(attention);
  p.out = view(out);
  run(passes().residual, p, p.batch * p.heads * p.tiles);
  return out;
}

std::tuple<Tensor, Tensor> residual_backward(Tensor grad_out, Tensor v, Tensor weight, std::vector<bool> needed) {
  check_needed(needed, 2);
  auto p = make_residual(v, weight);
  check("grad_out", grad_out, v, {p.batch, p.heads, p.tokens, p.value_dim}, v.scalar_type());
  const auto grad_v = new_gradient(v, needed[0]), grad_weight = new_gradient(weight, needed[1]);
  Tensor partial = new_accumulator(v, {needed[1] ? p.batch * p.heads * p.tiles : 0, p.kernel});
  p.grad_out = view(grad_out);
  p.grad_v = grad_v.view;
  p.grad_weight = grad_weight.view;
  p.partial = partial.data_ptr();
  run(passes().residual_backward, p, p.batch * p.heads * p.tiles);
  if (needed[1]) run(passes().residual_weight_backward, p, p.heads);
  return {grad_v.tensor, grad_weight.tensor};
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
