// CUDA's side of csrc/host/device.h: workspace and launches. The arithmetic is in the headers beside this.
#include "../host/device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../host/conv_norm.h"
#include "conv_norm.cuh"
#include "device.cuh"

namespace cxv {
namespace {

using namespace cuda;

cudaStream_t stream_of(const Tensor& t) {
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

int64_t multiprocessors(const Tensor& t) {
  int count = 0;
  STD_TORCH_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.get_device_index()) == cudaSuccess,
                  "cxv_kernels: the number of the device's multiprocessors is unknown");
  return count;
}

void allocate_and_run(Call call, Work p, const Tensor& like) {
  p.resident_blocks = multiprocessors(like);
  Tensor scratch = new_accumulator(like, {plan_workspace(p, call, nullptr)});
  plan_workspace(p, call, static_cast<float*>(scratch.data_ptr()));
  for_dtype(p.dtype, [&](auto t) { cuda::run<decltype(t)>(call, p, Launch{stream_of(like)}); });
}

void check_dtype(const char* op, DType dtype) {
  STD_TORCH_CHECK(dtype == DType::kHalf || dtype == DType::kFloat, "cxv_kernels: on CUDA ", op,
                  " supports float16 and float32 alone");
}

// The compute capability, times 10, whose code the device runs; 0: none.
int64_t cuda_compiled_for(int64_t device) {
  [[maybe_unused]] const torch::stable::accelerator::DeviceGuard guard(torch::stable::accelerator::DeviceIndex(device));
  cudaFuncAttributes attributes = {};
  if (cudaFuncGetAttributes(&attributes, norm_backward_reduce<float>) == cudaSuccess) return attributes.ptxVersion;
  cudaGetLastError();  // which it leaves behind
  return 0;
}

}  // namespace

namespace device {

void plan(LinearAttentionParams& p) {
  check_dtype("attention", p.dtype);
  STD_TORCH_CHECK(p.dim <= kMaxWidth && p.value_dim <= kMaxWidth, "cxv_kernels: on CUDA attention supports heads of ",
                  "at most ", kMaxWidth, " channels (D and E), got ", p.dim, " and ", p.value_dim);
  set_splits(p);
}

void run(Call call, const LinearAttentionParams& p, const Tensor& like) { allocate_and_run(call, {p}, like); }

Tensor features_max(const LinearAttentionParams& params, const Tensor& like) {
  Work p = {params};
  Tensor maxima = new_accumulator(like, {p.batch, p.heads, feature_maxima(p, multiprocessors(like))});
  p.feature_max = static_cast<float*>(maxima.data_ptr());
  allocate_and_run(Call::kFeaturesMax, p, like);
  return torch::stable::amax(maxima, {-1}, false);
}

void check_supported(const ConvNormParams& p) {
  check_dtype("conv_norm", p.dtype);
  STD_TORCH_CHECK(p.channels >= kMinNormChannels && p.channels <= kMaxNormChannels, "cxv_kernels: on CUDA conv_norm ",
                  "supports ", kMinNormChannels, " to ", kMaxNormChannels, " output channels, got ", p.channels);
}

void conv_norm_forward(const ConvNormParams& p, const Tensor& x) {
  for_dtype(p.dtype, [&](auto t) { norm_forward_pass<decltype(t)>(p, Launch{stream_of(x)}); });
}

Tensor conv_norm_backward(ConvNormParams& p, Tensor grad_out, const Tensor& x, const Tensor& weight, const Tensor& out,
                          bool conv_needed) {
  const Tensor y = to_dense(p, out);
  if (!is_dense(grad_out, p.channels_last)) {
    Tensor copy = new_like(y);
    grad_out = torch::stable::copy_(copy, grad_out);
  }
  const Tensor du = new_like(y);  // also the x̂ that out does not tell
  p.y = y.data_ptr();
  p.grad_out = grad_out.data_ptr();
  p.grad_conv = du.data_ptr();
  p.splits = norm_splits(p);
  Tensor partial = new_accumulator(x, {p.splits, 3, p.channels});
  Tensor mean_weight = new_accumulator(x, {x.size(1) * 9 + 1});
  Tensor lost = torch::stable::new_empty(x, {p.channels + 1}, ScalarType::Int);
  p.partial = partial.data_ptr();
  const NormWork work = {view(x),
                         view(weight),
                         x.size(1),
                         x.size(2),
                         x.size(3),
                         static_cast<float*>(mean_weight.data_ptr()),
                         static_cast<int*>(lost.data_ptr())};
  for_dtype(p.dtype, [&](auto t) { norm_backward_pass<decltype(t)>(p, work, conv_needed, Launch{stream_of(x)}); });
  return du;
}

}  // namespace device
}  // namespace cxv

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_compiled_for", TORCH_BOX(&cxv::cuda_compiled_for));
}
