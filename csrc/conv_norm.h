// conv_norm's host code that the CPU and CUDA share: PyTorch's convolution, checks, memory formats.
#pragma once

#include "include/conv_norm.h"
#include "tensor.h"

namespace cxv {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;
using torch::stable::detail::from;
using torch::stable::detail::to;

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
inline Tensor convolve(const Tensor& x, const Tensor& weight) {
  const IntHeaderOnlyArrayRef one(kOne), zero(kZero);
  std::array<StableIValue, 9> stack = {from(x),   from(weight), from(std::nullopt), from(one),       from(one),
                                       from(one), from(false),  from(zero),         from(int64_t{1})};
  call("aten::convolution", stack.data());
  Tensor u = to<Tensor>(stack[0]);
  STD_TORCH_CHECK(u.scalar_type() == x.scalar_type(), "cxv_kernels: conv_norm must be called outside autocast");
  return u;
}

inline std::array<Tensor, 2> convolve_backward(const Tensor& du, const Tensor& x, const Tensor& weight, bool need_x,
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
  call("aten::convolution_backward", stack.data());
  std::array<Tensor, 2> grads = {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  to<Tensor>(stack[2]);  // frees it
  return grads;
}

inline bool dense(const Tensor& t, bool channels_last) {
  const std::array<int, 4> order = channels_last ? std::array<int, 4>{1, 3, 2, 0} : std::array<int, 4>{3, 2, 1, 0};
  int64_t step = 1;
  for (int d : order) {
    if (t.size(d) != 1 && t.stride(d) != step) return false;
    step *= t.size(d);
  }
  return true;
}

inline void check(const char* name, const Tensor& t, const Tensor& x, std::initializer_list<int64_t> shape,
                  ScalarType dtype) {
  STD_TORCH_CHECK(t.dim() == int64_t(shape.size()), "cxv_kernels: ", name, " must have ", shape.size(),
                  " dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == dtype, "cxv_kernels: ", name, " has a dtype that does not go with x's");
  STD_TORCH_CHECK(t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index(), "cxv_kernels: ", name,
                  " must be on x's device");
  int64_t d = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(t.size(d) == size, "cxv_kernels: ", name, " has size ", t.size(d), " in dimension ", d,
                    ", expected ", size);
    ++d;
  }
}

// The arguments that both directions have; bias, gamma and beta come back contiguous.
inline ConvNorm describe(const Tensor& x, const Tensor& weight, std::optional<Tensor>& bias, Tensor& gamma,
                         Tensor& beta, double eps) {
  STD_TORCH_CHECK(x.dim() == 4, "cxv_kernels: x must have 4 dimensions (B, C_in, H, W), got ", x.dim());
  ConvNorm p = {};
  p.dtype = dtype_of(x, "x");
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
  check("gamma", gamma, x, {p.channels}, accumulator_of(x));
  check("beta", beta, x, {p.channels}, accumulator_of(x));
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
inline Tensor settle(ConvNorm& p, Tensor t) {
  // Where both fit, vectors run along what there is more of.
  const bool nchw = dense(t, false), nhwc = dense(t, true);
  if (!nchw && !nhwc) t = torch::stable::contiguous(t);
  p.channels_last = nhwc && !(nchw && p.pixels > 1);
  return t;
}

}  // namespace cxv
