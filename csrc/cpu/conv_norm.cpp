// conv_norm on the CPU: the norm's passes over threads. The norm is in conv_norm_kernel.h.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../conv_norm.h"
#include "kernels.h"

namespace {

using cxv::ConvNorm;
using cxv::ScalarType;
using torch::stable::Tensor;

// Runs of blocks in backward: fixed, so that the order of every sum depends on the shape alone.
constexpr int64_t kSplitBlocks = 4;
constexpr int64_t kMaxSplits = 128;

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
  const cxv::NoGrad guard;
  auto p = cxv::describe(x, weight, bias, gamma, beta, eps);
  Tensor out = cxv::settle(p, cxv::convolve(x, weight));
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
  const cxv::NoGrad guard;
  auto p = cxv::describe(x, weight, bias, gamma, beta, eps);
  cxv::check_needed(needed, 5);
  STD_TORCH_CHECK(!needed[2] || bias.has_value(), "cxv_kernels: a gradient of bias is needed, but bias is None");
  for (auto [name, t] : {std::pair("grad_out", &grad_out), {"out", &out}})
    cxv::check(name, *t, x, {p.batch, p.channels, x.size(2), x.size(3)}, x.scalar_type());
  cxv::check("rstd", rstd, x, {p.batch, x.size(2), x.size(3)}, cxv::accumulator_of(x));
  rstd = torch::stable::contiguous(rstd);
  p.rstd = rstd.data_ptr();

  // One tensor of the result's size: the convolution if it is run again, a copy of grad_out if that lies otherwise in
  // memory, and the convolution's gradient, which overwrites either.
  const bool conv_needed = needed[0] || needed[1];
  std::optional<Tensor> workspace;
  p.from_conv = x.scalar_type() == ScalarType::Double ? !invertible<double>(p, x.scalar_type())
                                                      : !invertible<float>(p, x.scalar_type());
  Tensor y = cxv::settle(p, p.from_conv ? cxv::convolve(x, weight) : out);
  if (p.from_conv) workspace = y;
  if (!cxv::dense(grad_out, p.channels_last)) {
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
    auto grads = cxv::convolve_backward(*workspace, x, weight, needed[0], needed[1]);
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
