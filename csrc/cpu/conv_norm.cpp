// conv_norm on the CPU: PyTorch's convolution, checks, memory and threads. The norm is in conv_norm_kernel.h.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../tensor.h"
#include "kernels.h"

namespace {

using cxv::ConvNorm;
using cxv::ScalarType;
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

// Runs of blocks in backward: fixed, so that the order of every sum depends on the shape alone.
constexpr int64_t kSplitBlocks = 4;
constexpr int64_t kMaxSplits = 128;

// The convolution inside is no part of the autograd graph: the op has its own.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

constexpr std::array<int64_t, 2> kOne = {1, 1}, kZero = {0, 0};

// x ∗ weight, 3×3, stride 1, padding 1, without bias: dense, in the memory format of PyTorch's choice.
Tensor convolve(const Tensor& x, const Tensor& weight) {
  const IntHeaderOnlyArrayRef one(kOne), zero(kZero);
  std::array<StableIValue, 9> stack = {from(x),   from(weight), from(std::nullopt), from(one),       from(one),
                                       from(one), from(false),  from(zero),         from(int64_t{1})};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  Tensor u = to<Tensor>(stack[0]);
  STD_TORCH_CHECK(u.scalar_type() == x.scalar_type(), "cxv_kernels: conv_norm must be called outside autocast");
  return u;
}

std::array<Tensor, 2> convolve_backward(const Tensor& du, const Tensor& x, const Tensor& weight, bool need_x,
                                        bool need_weight) {
  const IntHeaderOnlyArrayRef one(kOne), zero(kZero);
  const std::array<bool, 3> mask = {need_x, need_weight, false};
  std::array<StableIValue, 11> stack = {from(du),
                                        from(x),
                                        from(weight),
                                        from(std::nullopt),
                                        from(one),
                                        from(one),
                                        from(one),
                                        from(false),
                                        from(zero),
                                        from(int64_t{1}),
                                        from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, 2> grads = {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  to<Tensor>(stack[2]);  // frees it
  return grads;
}

bool dense(const Tensor& t, bool channels_last) {
  const std::array<int, 4> order = channels_last ? std::array<int, 4>{1, 3, 2, 0} : std::array<int, 4>{3, 2, 1, 0};
  int64_t step = 1;
  for (int d : order) {
    if (t.size(d) != 1 && t.stride(d) != step) return false;
    step *= t.size(d);
  }
  return true;
}

void check(const char* name, const Tensor& t, const Tensor& x, std::initializer_list<int64_t> shape, ScalarType dtype) {
  STD_TORCH_CHECK(t.dim() == int64_t(shape.size()), "cxv_kernels: ", name, " must have ", shape.size(),
                  " dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == dtype, "cxv_kernels: ", name, " has a dtype that does not go with x's");
  STD_TORCH_CHECK(t.is_cpu(), "cxv_kernels: ", name, " must be on x's device");
  int64_t d = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(t.size(d) == size, "cxv_kernels: ", name, " has size ", t.size(d), " in dimension ", d,
                    ", expected ", size);
    ++d;
  }
}

// The arguments that both directions have; bias, gamma and beta come back contiguous.
ConvNorm describe(const Tensor& x, const Tensor& weight, std::optional<Tensor>& bias, Tensor& gamma, Tensor& beta,
                  double eps) {
  STD_TORCH_CHECK(x.dim() == 4, "cxv_kernels: x must have 4 dimensions (B, C_in, H, W), got ", x.dim());
  ConvNorm p = {};
  p.dtype = cxv::dtype_of(x, "x");
  // of an x without channels PyTorch's convolution has another shape
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0,
                  "cxv_kernels: x must have at least one channel, row and column");
  STD_TORCH_CHECK(weight.dim() == 4, "cxv_kernels: weight must have 4 dimensions, got ", weight.dim());
  p.channels = weight.size(0);
  STD_TORCH_CHECK(p.channels > 0, "cxv_kernels: weight must have at least one output channel");
  check("weight", weight, x, {p.channels, x.size(1), 3, 3}, x.scalar_type());
  if (bias.has_value()) {
    check("bias", *bias, x, {p.channels}, x.scalar_type());
    bias = torch::stable::contiguous(*bias);
    p.bias = bias->data_ptr();
  }
  check("gamma", gamma, x, {p.channels}, cxv::accumulator_of(x));
  check("beta", beta, x, {p.channels}, cxv::accumulator_of(x));
  gamma = torch::stable::contiguous(gamma);
  beta = torch::stable::contiguous(beta);
  p.gamma = gamma.data_ptr();
  p.beta = beta.data_ptr();
  p.eps = eps;
  p.batch = x.size(0);
  p.pixels = x.size(2) * x.size(3);
  return p;
}

// t dense in memory, and p told of its format.
Tensor settle(ConvNorm& p, Tensor t) {
  // Where both fit, vectors run along what there is more of.
  const bool nchw = dense(t, false), nhwc = dense(t, true);
  if (!nchw && !nhwc) t = torch::stable::contiguous(t);
  p.channels_last = nhwc && !(nchw && p.pixels > 1);
  return t;
}

void run(cxv::ConvNormKernels::Pass pass, const ConvNorm& p, int64_t items) {
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) { pass(p, begin, end); });
}

// Can x̂ be read off the result, as (out − β)/γ? Rounding out to a unit roundoff of u leaves an error of u(|x̂| + |β/γ|),
// and what is subnormal or infinite leaves more. Of one or two channels du is little more than what cancels.
template <class A>
bool invertible(const ConvNorm& p, ScalarType dtype) {
  const bool low = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  const A ratio = low ? 4 : 32;
  const A smallest = dtype == ScalarType::Half ? A(0x1p-14) : std::numeric_limits<A>::min();
  const A largest = dtype == ScalarType::Half ? A(65504) : std::numeric_limits<A>::max() / 2;
  if (p.channels <= 2) return false;
  const A root = std::sqrt(A(p.channels));  // |x̂| is less
  for (int64_t c = 0; c < p.channels; ++c) {
    const A gamma = std::abs(static_cast<const A*>(p.gamma)[c]), beta = std::abs(static_cast<const A*>(p.beta)[c]);
    if (!(gamma >= smallest && beta <= ratio * gamma && root * gamma + beta <= largest)) return false;
  }
  return true;
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor gamma, Tensor beta,
                                   double eps) {
  const NoGrad guard;
  auto p = describe(x, weight, bias, gamma, beta, eps);
  Tensor out = settle(p, convolve(x, weight));
  Tensor rstd = cxv::new_accumulator(x, {p.batch, x.size(2), x.size(3)});
  p.y = out.data_ptr();
  p.rstd = rstd.data_ptr();
  run(cxv::kernels().conv_norm.forward, p, p.blocks());
  return {out, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor x, Tensor weight,
                                                            std::optional<Tensor> bias, Tensor out, Tensor rstd,
                                                            Tensor gamma, Tensor beta, double eps,
                                                            std::vector<bool> needed) {
  const NoGrad guard;
  auto p = describe(x, weight, bias, gamma, beta, eps);
  STD_TORCH_CHECK(needed.size() == 5, "cxv_kernels: needed must have 5 elements, got ", needed.size());
  STD_TORCH_CHECK(!needed[2] || bias.has_value(), "cxv_kernels: a gradient of bias is needed, but bias is None");
  for (auto [name, t] : {std::pair("grad_out", &grad_out), {"out", &out}})
    check(name, *t, x, {p.batch, p.channels, x.size(2), x.size(3)}, x.scalar_type());
  check("rstd", rstd, x, {p.batch, x.size(2), x.size(3)}, cxv::accumulator_of(x));
  rstd = torch::stable::contiguous(rstd);
  p.rstd = rstd.data_ptr();

  // One tensor of the result's size: the convolution if it is run again, a copy of grad_out if that lies otherwise in
  // memory, and the convolution's gradient, which overwrites either.
  const bool conv_needed = needed[0] || needed[1];
  std::optional<Tensor> workspace;
  p.from_conv = x.scalar_type() == ScalarType::Double ? !invertible<double>(p, x.scalar_type())
                                                      : !invertible<float>(p, x.scalar_type());
  Tensor y = settle(p, p.from_conv ? convolve(x, weight) : out);
  if (p.from_conv) workspace = y;
  if (!dense(grad_out, p.channels_last)) {
    Tensor copy = cxv::new_like(y, {p.batch, p.channels, x.size(2), x.size(3)});
    grad_out = torch::stable::copy_(copy, grad_out);
    workspace = grad_out;
  }
  if (conv_needed && !workspace.has_value()) workspace = cxv::new_like(y, {p.batch, p.channels, x.size(2), x.size(3)});
  p.y = y.data_ptr();
  p.grad_out = grad_out.data_ptr();
  p.grad_conv = conv_needed ? workspace->data_ptr() : nullptr;

  const auto result = [&](bool wanted, ScalarType dtype) {
    return torch::stable::new_empty(x, {wanted ? p.channels : 0}, dtype);
  };
  Tensor grad_bias = result(needed[2], x.scalar_type());
  Tensor grad_gamma = result(needed[3], cxv::accumulator_of(x));
  Tensor grad_beta = result(needed[4], cxv::accumulator_of(x));
  p.grad_bias = needed[2] ? grad_bias.data_ptr() : nullptr;
  p.grad_gamma = needed[3] ? grad_gamma.data_ptr() : nullptr;
  p.grad_beta = needed[4] ? grad_beta.data_ptr() : nullptr;
  p.splits = std::clamp<int64_t>(p.blocks() / kSplitBlocks, 1, kMaxSplits);
  Tensor partial = cxv::new_accumulator(x, {p.splits, 3, p.channels});
  p.partial = partial.data_ptr();
  run(cxv::kernels().conv_norm.backward, p, p.splits);
  if (needed[2] || needed[3] || needed[4]) run(cxv::kernels().conv_norm.backward_reduce, p, p.channels);

  Tensor grad_x = torch::stable::new_empty(x, {0}), grad_weight = torch::stable::new_empty(x, {0});
  if (conv_needed) {
    auto grads = convolve_backward(*workspace, x, weight, needed[0], needed[1]);
    if (needed[0]) grad_x = grads[0];
    if (needed[1]) grad_weight = grads[1];
  }
  return {grad_x, grad_weight, grad_bias, grad_gamma, grad_beta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CPU, m) {
  m.impl("conv_norm_forward", TORCH_BOX(&forward));
  m.impl("conv_norm_backward", TORCH_BOX(&backward));
}
