// What a device library provides to csrc/host: csrc/cpu/device.cpp in _cpu, csrc/cuda/device.cu in _cuda.
#pragma once

#include "../core/conv_norm.h"
#include "../core/linear_attention.h"
#include "../core/tensor.h"

namespace cxv::device {

// Sets the splits. Raises an error if the device does not support the parameters.
void plan(LinearAttentionParams& p);
// Workspace is allocated on `like`'s device.
void linear_attention_forward(const LinearAttentionParams& p, const Tensor& like);
void linear_attention_backward(const LinearAttentionParams& p, const Tensor& like);
void kv_state_forward(const LinearAttentionParams& p, const Tensor& like);
void kv_state_backward(const LinearAttentionParams& p, const Tensor& like);
Tensor performer_features_max(const LinearAttentionParams& p, const Tensor& like);  // (B, H): the largest exponent
void performer_features_forward(const LinearAttentionParams& p, const Tensor& like);
void performer_features_backward(const LinearAttentionParams& p, const Tensor& like);

void check_supported(const ConvNormParams& p);
void conv_norm_forward(const ConvNormParams& p, const Tensor& x);
// Returns the convolution's gradient, which has elements only if `conv_needed`.
Tensor conv_norm_backward(ConvNormParams& p, Tensor grad_out, const Tensor& x, const Tensor& weight, const Tensor& out,
                          bool conv_needed);

}  // namespace cxv::device
