// conv_norm: PyTorch's convolution, checks, allocation.
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "conv_norm.h"
#include "device.h"

namespace cxv {
namespace {

// bias, gamma and beta become contiguous.
ConvNormParams make_params(const Tensor& x, const Tensor& weight, std::optional<Tensor>& bias, Tensor& gamma,
                           Tensor& beta, double eps) {
  STD_TORCH_CHECK(x.dim() == 4, "cxv_kernels: x must have 4 dimensions (B, C_in, H, W), got ", x.dim());
  ConvNormParams p = {};
  p.dtype = dtype_of(x, "x");
  // of an x without channels PyTorch's convolution has another shape
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0,
                  "cxv_kernels: x must have at least one channel, row and column");
  STD_TORCH_CHECK(weight.dim() == 4, "cxv_kernels: weight must have 4 dimensions, got ", weight.dim());
  p.channels = weight.size(0);
  STD_TORCH_CHECK(p.channels > 0, "cxv_kernels: weight must have at least one output channel");
  check("weight", weight, x, {p.channels, x.size(1), 3, 3}, x.scalar_type(), "x");
  if (bias.has_value()) {
    check("bias", *bias, x, {p.channels}, x.scalar_type(), "x");
    bias = torch::stable::contiguous(*bias);
    p.bias = bias->data_ptr();
  }
  p.gamma = checked_data("gamma", gamma, x, {p.channels}, "x");
  p.beta = checked_data("beta", beta, x, {p.channels}, "x");
  p.eps = eps;
  p.batch = x.size(0);
  p.pixels = x.size(2) * x.size(3);
  device::check_supported(p);
  return p;
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor gamma, Tensor beta,
                                   double eps) {
  const NoGrad no_grad;
  const OnDevice guard(x);
  auto p = make_params(x, weight, bias, gamma, beta, eps);
  Tensor out = to_dense(p, convolve(x, weight));
  Tensor rstd = new_accumulator(x, {p.batch, x.size(2), x.size(3)});
  p.y = out.data_ptr();
  p.rstd = rstd.data_ptr();
  device::conv_norm_forward(p, x);
  return {out, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor x, Tensor weight,
                                                            std::optional<Tensor> bias, Tensor out, Tensor rstd,
                                                            Tensor gamma, Tensor beta, double eps,
                                                            std::vector<bool> needed) {
  const NoGrad no_grad;
  const OnDevice guard(x);
  auto p = make_params(x, weight, bias, gamma, beta, eps);
  check_needed(needed, 5);
  STD_TORCH_CHECK(!needed[2] || bias.has_value(), "cxv_kernels: a gradient of bias is needed, but bias is None");
  check("grad_out", grad_out, x, {p.batch, p.channels, x.size(2), x.size(3)}, x.scalar_type(), "x");
  check("out", out, x, {p.batch, p.channels, x.size(2), x.size(3)}, x.scalar_type(), "x");
  p.rstd = checked_data("rstd", rstd, x, {p.batch, x.size(2), x.size(3)}, "x");
  const auto vector = [&](bool wanted, ScalarType dtype, void** data) {
    Tensor grad = torch::stable::new_empty(x, {wanted ? p.channels : 0}, dtype);
    *data = wanted ? grad.data_ptr() : nullptr;
    return grad;
  };
  Tensor grad_bias = vector(needed[2], x.scalar_type(), &p.grad_bias);
  Tensor grad_gamma = vector(needed[3], accumulator_of(x), &p.grad_gamma);
  Tensor grad_beta = vector(needed[4], accumulator_of(x), &p.grad_beta);
  const bool conv_needed = needed[0] || needed[1];
  const Tensor du = device::conv_norm_backward(p, grad_out, x, weight, out, conv_needed);
  Tensor grad_x = torch::stable::new_empty(x, {0}), grad_weight = torch::stable::new_empty(x, {0});
  if (conv_needed) {
    const IntHeaderOnlyArrayRef one(kOne), zero(kZero);
    const std::array<bool, 3> mask = {needed[0], needed[1], false};
    const auto grads = call<3>("aten::convolution_backward", du, x, weight, std::nullopt, one, one, one, false, zero,
                               int64_t{1}, torch::headeronly::HeaderOnlyArrayRef<bool>(mask));
    if (needed[0]) grad_x = grads[0];
    if (needed[1]) grad_weight = grads[1];
  }
  return {grad_x, grad_weight, grad_bias, grad_gamma, grad_beta};
}

}  // namespace
}  // namespace cxv

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CXV_DEVICE, m) {
  m.impl("conv_norm_forward", TORCH_BOX(&cxv::forward));
  m.impl("conv_norm_backward", TORCH_BOX(&cxv::backward));
}
