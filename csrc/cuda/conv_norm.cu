// conv_norm on CUDA: PyTorch's convolution, memory, launches. The norm is in conv_norm_kernel.cuh.
#include "conv_norm_kernel.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>
#include <vector>

#include "../conv_norm.h"

namespace {

using cxv::ConvNorm;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// Launches on x's device and the caller's stream, without waiting.
struct Launch {
  cudaStream_t stream;
  explicit Launch(const Tensor& x) {
    void* current;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  template <class Kernel, class... Arguments>
  void operator()(Kernel kernel, int64_t blocks, int bytes, const Arguments&... arguments) const {
    if (blocks == 0) return;
    kernel<<<unsigned(blocks), cxv::cuda::kNormThreads, bytes, stream>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

// f(T{}) for the storage type.
template <class F>
void for_dtype(cxv::DType dtype, F&& f) {
  if (dtype == cxv::DType::kHalf) return f(__half{});
  STD_TORCH_CHECK(dtype == cxv::DType::kFloat, "cxv_kernels: on CUDA conv_norm supports float16 and float32");
  f(float{});
}

ConvNorm describe(const Tensor& x, const Tensor& weight, std::optional<Tensor>& bias, Tensor& gamma, Tensor& beta,
                  double eps) {
  const auto p = cxv::describe(x, weight, bias, gamma, beta, eps);
  STD_TORCH_CHECK(p.channels >= cxv::cuda::kMinNormChannels && p.channels <= cxv::cuda::kMaxNormChannels,
                  "cxv_kernels: on CUDA conv_norm serves 3 to ", cxv::cuda::kMaxNormChannels, " output channels, got ",
                  p.channels);
  return p;
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor gamma, Tensor beta,
                                   double eps) {
  const cxv::NoGrad no_grad;
  const DeviceGuard guard(x.get_device_index());
  auto p = describe(x, weight, bias, gamma, beta, eps);
  Tensor out = cxv::settle(p, cxv::convolve(x, weight));
  Tensor rstd = cxv::new_accumulator(x, {p.batch, x.size(2), x.size(3)});
  p.y = out.data_ptr();
  p.rstd = rstd.data_ptr();
  for_dtype(p.dtype, [&](auto t) { cxv::cuda::norm_forward_pass<decltype(t)>(p, Launch(x)); });
  return {out, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor x, Tensor weight,
                                                            std::optional<Tensor> bias, Tensor out, Tensor rstd,
                                                            Tensor gamma, Tensor beta, double eps,
                                                            std::vector<bool> needed) {
  const cxv::NoGrad no_grad;
  const DeviceGuard guard(x.get_device_index());
  auto p = describe(x, weight, bias, gamma, beta, eps);
  cxv::check_needed(needed, 5);
  STD_TORCH_CHECK(!needed[2] || bias.has_value(), "cxv_kernels: a gradient of bias is needed, but bias is None");
  for (auto [name, t] : {std::pair("grad_out", &grad_out), {"out", &out}})
    cxv::check(name, *t, x, {p.batch, p.channels, x.size(2), x.size(3)}, x.scalar_type());
  cxv::check("rstd", rstd, x, {p.batch, x.size(2), x.size(3)}, cxv::accumulator_of(x));
  rstd = torch::stable::contiguous(rstd);
  p.rstd = rstd.data_ptr();

  const Tensor y = cxv::settle(p, out);
  const auto like_y = [&] { return cxv::new_like(y, {p.batch, p.channels, x.size(2), x.size(3)}); };
  if (!cxv::dense(grad_out, p.channels_last)) {
    Tensor copy = like_y();
    grad_out = torch::stable::copy_(copy, grad_out);
  }
  const Tensor du = like_y();
  p.y = y.data_ptr();
  p.grad_out = grad_out.data_ptr();
  p.grad_conv = du.data_ptr();

  const auto result = [&](bool wanted, cxv::ScalarType dtype) {
    return torch::stable::new_empty(x, {wanted ? p.channels : 0}, dtype);
  };
  Tensor grad_bias = result(needed[2], x.scalar_type());
  Tensor grad_gamma = result(needed[3], cxv::accumulator_of(x));
  Tensor grad_beta = result(needed[4], cxv::accumulator_of(x));
  p.grad_bias = needed[2] ? grad_bias.data_ptr() : nullptr;
  p.grad_gamma = needed[3] ? grad_gamma.data_ptr() : nullptr;
  p.grad_beta = needed[4] ? grad_beta.data_ptr() : nullptr;
  p.splits = cxv::cuda::norm_splits(p);
  Tensor partial = cxv::new_accumulator(x, {p.splits, 3, p.channels});
  Tensor mean_weight = cxv::new_accumulator(x, {x.size(1) * 9 + 1});
  Tensor lost = torch::stable::new_empty(x, {p.channels + 1}, cxv::ScalarType::Int);
  p.partial = partial.data_ptr();
  const cxv::cuda::NormWork work = {cxv::view(x),
                                    cxv::view(weight),
                                    x.size(1),
                                    x.size(2),
                                    x.size(3),
                                    static_cast<float*>(mean_weight.data_ptr()),
                                    static_cast<int*>(lost.data_ptr())};
  const bool conv_needed = needed[0] || needed[1];
  for_dtype(p.dtype, [&](auto t) { cxv::cuda::norm_backward_pass<decltype(t)>(p, work, conv_needed, Launch(x)); });

  Tensor grad_x = torch::stable::new_empty(x, {0}), grad_weight = torch::stable::new_empty(x, {0});
  if (conv_needed) {
    auto grads = cxv::convolve_backward(du, x, weight, needed[0], needed[1]);
    if (needed[0]) grad_x = grads[0];
    if (needed[1]) grad_weight = grads[1];
  }
  return {grad_x, grad_weight, grad_bias, grad_gamma, grad_beta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CUDA, m) {
  m.impl("conv_norm_forward", TORCH_BOX(&forward));
  m.impl("conv_norm_backward", TORCH_BOX(&backward));
}
