// The CPU's side of csrc/host/device.h: splits, threads and workspace. The arithmetic is in the headers beside this.
#include "../host/device.h"

#include <cmath>
#include <limits>

#include "../host/conv_norm.h"
#include "isa/kernels.h"

namespace cxv {
namespace {

using Pass = LinearAttentionKernels::Pass;

// Constants, so that the order of every sum depends only on the shape.
constexpr int64_t kSplitTokens = 1024;                      // of linear attention
constexpr int64_t kSplitBlocks = 4, kMaxBlockSplits = 128;  // of conv_norm's backward

const LinearAttentionKernels& passes() { return kernels().linear_attention; }
int64_t heads(const LinearAttentionParams& p) { return p.batch * p.heads; }

void run(Pass pass, const LinearAttentionParams& p, const Workspace& work, int64_t begin, int64_t end) {
  torch::stable::parallel_for(begin, end, 1, [&](int64_t from, int64_t to) { pass(p, work, from, to); });
}
void run(ConvNormKernels::Pass pass, const ConvNormParams& p, int64_t items) {
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) { pass(p, begin, end); });
}

// How many items of a pass have a partial state at a time: the workspace grows with the threads, not with N.
int64_t items_at_once(int64_t items) {
  return std::min<int64_t>(items, std::max<int64_t>(64, 32 * int64_t(torch::stable::get_num_threads())));
}

// `pass` over the splits of all heads, and `reduce` over their heads, as many at a time as have a partial state.
void run_and_reduce(Pass pass, Pass reduce, const LinearAttentionParams& p, Workspace& work, int64_t splits) {
  const int64_t items = heads(p) * splits, size = items_at_once(items);
  for (work.begin = 0; work.begin < items; work.begin = work.end) {
    work.end = std::min(work.begin + size, items);
    run(pass, p, work, work.begin, work.end);
    run(reduce, p, work, work.begin / splits, (work.end - 1) / splits + 1);
  }
}

// True if x̂ can be computed from the result as (out − β)/γ. If out is rounded with a unit roundoff of u, x̂ has an
// error of u(|x̂| + |β/γ|), and a larger one if out is subnormal or infinite. With one or two channels, du is little
// more than the rounding error of a cancellation.
template <class A>
bool can_recover_xhat(const ConvNormParams& p) {
  const bool half = p.dtype == DType::kHalf, low = half || p.dtype == DType::kBFloat16;
  const A ratio = low ? 4 : 32;
  const A smallest = half ? A(0x1p-14) : std::numeric_limits<A>::min();
  const A largest = half ? A(65504) : std::numeric_limits<A>::max() / 2;
  if (p.channels <= 2) return false;
  const A root = std::sqrt(A(p.channels));  // |x̂| is less
  for (int64_t c = 0; c < p.channels; ++c) {
    const A gamma = std::abs(static_cast<const A*>(p.gamma)[c]), beta = std::abs(static_cast<const A*>(p.beta)[c]);
    if (!(gamma >= smallest && beta <= ratio * gamma && root * gamma + beta <= largest)) return false;
  }
  return true;
}

}  // namespace

namespace device {

void plan(LinearAttentionParams& p) {
  const auto splits = [](int64_t tokens) { return std::max<int64_t>((tokens + kSplitTokens - 1) / kSplitTokens, 1); };
  p.key_splits = splits(p.keys);
  p.query_splits = splits(p.queries);
}

void kv_state_forward(const LinearAttentionParams& p, const Tensor& like) {
  Tensor running = new_accumulator(like, {heads(p), p.features + p.value_dim + 1});
  Tensor partial = new_accumulator(like, {items_at_once(heads(p) * p.key_splits), passes().key_partial(p)});
  Workspace work = {partial.data_ptr(), running.data_ptr()};
  run_and_reduce(passes().key_pass, passes().reduce_keys, p, work, p.key_splits);
}

void kv_state_backward(const LinearAttentionParams& p, const Tensor&) {
  run(passes().key_backward, p, {}, 0, heads(p) * p.key_splits);
}

void linear_attention_forward(const LinearAttentionParams& p, const Tensor& like) {
  kv_state_forward(p, like);
  run(passes().query_pass, p, {}, 0, heads(p) * p.query_splits);
}

void linear_attention_backward(const LinearAttentionParams& p, const Tensor& like) {
  const int64_t items = heads(p) * p.query_splits;
  if (!has_key_gradients(p)) return run(passes().query_backward, p, {}, 0, items);
  Tensor partial = new_accumulator(like, {items_at_once(items), passes().query_partial(p)});
  Workspace work = {partial.data_ptr(), nullptr};
  run_and_reduce(passes().query_backward, passes().reduce_queries, p, work, p.query_splits);
  kv_state_backward(p, like);
}

Tensor performer_features_max(const LinearAttentionParams& p, const Tensor& like) {
  Tensor split_max = new_accumulator(like, {p.batch, p.heads, p.query_splits});
  run(passes().features_max, p, {split_max.data_ptr(), nullptr}, 0, heads(p) * p.query_splits);
  return torch::stable::amax(split_max, {-1}, false);
}

void performer_features_forward(const LinearAttentionParams& p, const Tensor&) {
  run(passes().features_forward, p, {}, 0, heads(p) * p.query_splits);
}

void performer_features_backward(const LinearAttentionParams& p, const Tensor&) {
  run(passes().features_backward, p, {}, 0, heads(p) * p.query_splits);
}

void check_supported(const ConvNormParams&) {}

void conv_norm_forward(const ConvNormParams& p, const Tensor&) { run(kernels().conv_norm.forward, p, p.blocks()); }

// Allocates one tensor of the result's size. It holds the convolution if that is computed again, a copy of grad_out if
// its memory format differs, and then the gradient of the convolution, which overwrites them.
Tensor conv_norm_backward(ConvNormParams& p, Tensor grad_out, const Tensor& x, const Tensor& weight, const Tensor& out,
                          bool conv_needed) {
  std::optional<Tensor> workspace;
  p.from_conv = !(p.dtype == DType::kDouble ? can_recover_xhat<double>(p) : can_recover_xhat<float>(p));
  const Tensor y = to_dense(p, p.from_conv ? convolve(x, weight) : out);
  if (p.from_conv) workspace = y;
  if (!is_dense(grad_out, p.channels_last)) {
    Tensor copy = new_like(y);
    grad_out = torch::stable::copy_(copy, grad_out);
    workspace = grad_out;
  }
  if (!workspace.has_value()) workspace = conv_needed ? new_like(y) : torch::stable::new_empty(x, {0});
  p.y = y.data_ptr();
  p.grad_out = grad_out.data_ptr();
  p.grad_conv = conv_needed ? workspace->data_ptr() : nullptr;
  p.splits = std::clamp<int64_t>(p.blocks() / kSplitBlocks, 1, kMaxBlockSplits);
  Tensor partial = new_accumulator(x, {p.splits, 3, p.channels});
  p.partial = partial.data_ptr();
  run(kernels().conv_norm.backward, p, p.splits);
  if (p.grad_bias || p.grad_gamma || p.grad_beta) run(kernels().conv_norm.backward_reduce, p, p.channels);
  return *workspace;
}

}  // namespace device
}  // namespace cxv
