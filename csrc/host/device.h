// What a device library provides to csrc/host: csrc/cpu/device.cpp in _cpu, csrc/cuda/device.cu in _cuda.
#pragma once

#include "../core/conv_norm.h"
#include "../core/linear_attention.h"
#include "../core/tensor.h"

namespace cxv::device {

// Sets the splits. Raises an error if the device does not support the parameters.
void plan(LinearAttentionParams& p);
// Workspace is allocated on `like`'s device.
void run(Call call, const LinearAttentionParams& p, const Tensor& like);
Tensor features_max(const LinearAttentionParams& p, const Tensor& like);  // (B, H): the largest exponent

void check_supported(const ConvNormParams& p);
void conv_norm_forward(const ConvNormParams& p, const Tensor& x);
// Returns the convolution's gradient, which has elements only if `conv_needed`.
Tensor conv_norm_backward(ConvNormParams& p, Tensor grad_out, const Tensor& x, const Tensor& weight, const Tensor& out,
                          bool conv_needed);

}  // namespace cxv::device
