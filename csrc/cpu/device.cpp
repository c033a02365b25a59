// The CPU's side of csrc/host/device.h: splits, threads and workspace. The arithmetic is in the headers beside this.
#include "../host/device.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>

#include "../host/conv_norm.h"
#include "parallel.h"

namespace cxv {
namespace {

// Constants, so that the order of every sum depends only on the shape.
constexpr int64_t kSplitTokens = 1024;                      // of linear attention
constexpr int64_t kSplitBlocks = 4, kMaxBlockSplits = 128;  // of conv_norm's backward

// `pass` over the splits of all heads, and `reduce` over their heads, as many splits at a time as have a partial state:
// the workspace grows with the threads, not with N.
void run_and_reduce(Pass<LinearAttentionWork> pass, Pass<LinearAttentionWork> reduce, LinearAttentionWork p,
                    int64_t splits, int64_t partial_size, const Tensor& like) {
  const int64_t items = p.batch * p.heads * splits;
  const int64_t at_once = std::min(items, std::max<int64_t>(64, 32 * int64_t(torch::stable::get_num_threads())));
  Tensor partial = new_accumulator(like, {at_once, partial_size});
  p.partial = partial.data_ptr();
  for (; p.first < items; p.first = p.last) {
    p.last = std::min(p.first + at_once, items);
    run_pass(pass, p, p.first, p.last);
    run_pass(reduce, p, p.first / splits, (p.last - 1) / splits + 1);
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

#if defined(__clang__)
#define CXV_COMPILER __VERSION__
#else
#define CXV_COMPILER "gcc " __VERSION__
#endif

// Lines of name=value.
std::string build_info() { return std::string(CXV_BUILD_INFO "\ncompiler=" CXV_COMPILER "\ncpu_isa=") + kernels().isa; }

}  // namespace

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels* const widest = [] {
    const char* variable = std::getenv("CXV_CPU_ISA");
    const std::string limit = variable == nullptr ? kAvx512Kernels.isa : variable;
    const bool up_to_avx512 = limit == kAvx512Kernels.isa, up_to_avx2 = up_to_avx512 || limit == kAvx2Kernels.isa;
    STD_TORCH_CHECK(up_to_avx2 || limit == kBaselineKernels.isa,
                    "cxv_kernels: CXV_CPU_ISA must be baseline, avx2 or avx512, got ", limit);
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && up_to_avx512) return &kAvx512Kernels;
    return avx2 && up_to_avx2 ? &kAvx2Kernels : &kBaselineKernels;
  }();
  return *widest;
#else
  return kBaselineKernels;
#endif
}

namespace device {

void plan(LinearAttentionParams& p) {
  const auto splits = [](int64_t tokens) { return std::max<int64_t>((tokens + kSplitTokens - 1) / kSplitTokens, 1); };
  p.key_splits = splits(p.keys);
  p.query_splits = splits(p.queries);
}

void run(Call call, const LinearAttentionParams& params, const Tensor& like) {
  LinearAttentionWork p = {params};
  const Kernels& passes = kernels();
  const int64_t heads = p.batch * p.heads, queries = heads * p.query_splits;
  const bool backward = call == Call::kBackward, key_gradients = backward && has_key_gradients(p);
  if (call == Call::kForward || call == Call::kState) {
    Tensor running = new_accumulator(like, {heads, p.features + p.value_dim + 1});
    p.running = running.data_ptr();
    run_and_reduce(passes.key_pass, passes.reduce_keys, p, p.key_splits, key_partial_size(p), like);
  }
  if (call == Call::kForward) run_pass(passes.query_pass, p, 0, queries);
  if (backward && !key_gradients) run_pass(passes.query_backward, p, 0, queries);
  if (key_gradients)
    run_and_reduce(passes.query_backward, passes.reduce_queries, p, p.query_splits, query_partial_size(p), like);
  if (key_gradients || call == Call::kStateBackward) run_pass(passes.key_backward, p, 0, heads * p.key_splits);
  if (call == Call::kFeaturesForward) run_pass(passes.features_forward, p, 0, queries);
  if (call == Call::kFeaturesBackward) run_pass(passes.features_backward, p, 0, queries);
}

Tensor features_max(const LinearAttentionParams& params, const Tensor& like) {
  LinearAttentionWork p = {params};
  Tensor split_max = new_accumulator(like, {p.batch, p.heads, p.query_splits});
  p.partial = split_max.data_ptr();
  run_pass(kernels().features_max, p, 0, p.batch * p.heads * p.query_splits);
  return torch::stable::amax(split_max, {-1}, false);
}

void check_supported(const ConvNormParams&) {}

void conv_norm_forward(const ConvNormParams& p, const Tensor&) { run_pass(kernels().norm_forward, p, 0, p.blocks()); }

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
  run_pass(kernels().norm_backward, p, 0, p.splits);
  if (p.grad_bias || p.grad_gamma || p.grad_beta) run_pass(kernels().norm_backward_reduce, p, 0, p.channels);
  return *workspace;
}

}  // namespace device
}  // namespace cxv

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&cxv::build_info));
}
