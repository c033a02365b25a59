// What conv_norm's host code and the device libraries share: the convolution, and dense memory formats.
#pragma once

#include "../core/conv_norm.h"
#include "../core/tensor.h"

namespace cxv {

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

inline constexpr std::array<int64_t, 2> kOne = {1, 1}, kZero = {0, 0};

// x ∗ weight, 3×3, stride 1, padding 1, without bias: dense, in the memory format of PyTorch's choice.
inline Tensor convolve(const Tensor& x, const Tensor& weight) {
  const IntHeaderOnlyArrayRef one(kOne), zero(kZero);
  Tensor u = call("aten::convolution", x, weight, std::nullopt, one, one, one, false, zero, int64_t{1})[0];
  STD_TORCH_CHECK(u.scalar_type() == x.scalar_type(), "cxv_kernels: conv_norm must be called outside autocast");
  return u;
}

inline bool is_dense(const Tensor& t, bool channels_last) {
  const std::array<int, 4> order = channels_last ? std::array<int, 4>{1, 3, 2, 0} : std::array<int, 4>{3, 2, 1, 0};
  int64_t step = 1;
  for (int d : order) {
    if (t.size(d) != 1 && t.stride(d) != step) return false;
    step *= t.size(d);
  }
  return true;
}

// t dense in memory; p.channels_last is its format.
inline Tensor to_dense(ConvNormParams& p, Tensor t) {
  // If t has both formats, vectors run along the larger dimension.
  const bool nchw = is_dense(t, false), nhwc = is_dense(t, true);
  if (!nchw && !nhwc) t = torch::stable::contiguous(t);
  p.channels_last = nhwc && !(nchw && p.pixels > 1);
  return t;
}

// An uninitialized tensor in the layout of the dense y.
inline Tensor new_like(const Tensor& y) { return new_like(y, {y.size(0), y.size(1), y.size(2), y.size(3)}); }

}  // namespace cxv
