// dropout and gelu_dropout on the CPU: checks and threads. The arithmetic is in dropout_kernel.h.
#include <torch/csrc/stable/library.h>

#include "../tensor.h"
#include "kernels.h"

namespace {

using torch::stable::Tensor;

void check(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == x.scalar_type() && t.numel() == x.numel(),
                  "cxv_kernels: ", name, " must be contiguous and have x's size and dtype");
}

Tensor run(cxv::Dropout::Map map, const Tensor& x, const Tensor* activated, const Tensor* residual, const Tensor& seed,
           double p, int64_t offset) {
  STD_TORCH_CHECK(x.is_contiguous(), "cxv_kernels: x must be contiguous");
  STD_TORCH_CHECK(p >= 0 && p < 1, "cxv_kernels: p must be in [0, 1), got ", p);
  STD_TORCH_CHECK(offset >= 0, "cxv_kernels: offset must be at least 0, got ", offset);
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == torch::headeronly::ScalarType::Long,
                  "cxv_kernels: seed must be one int64");
  Tensor out = torch::stable::empty_like(x);
  cxv::Dropout d = {};
  d.dtype = cxv::dtype_of(x);
  d.map = map;
  if (activated != nullptr) {
    check("the activated tensor", *activated, x);
    d.activated = activated->data_ptr();
  }
  if (residual != nullptr) {
    check("residual", *residual, x);
    d.residual = residual->data_ptr();
  }
  d.x = x.data_ptr();
  d.out = out.data_ptr();
  d.count = x.numel();
  d.offset = offset;
  d.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr()));
  d.threshold = static_cast<int32_t>(65536 * (1 - p) + 0.5);
  const int64_t first = offset / cxv::kDropoutBlock;
  const int64_t blocks = d.count == 0 ? 0 : (offset + d.count - 1) / cxv::kDropoutBlock - first + 1;
  torch::stable::parallel_for(0, blocks, 64,
                              [&](int64_t begin, int64_t end) { cxv::kernels().dropout.apply(d, begin, end); });
  return out;
}

Tensor dropout(Tensor x, std::optional<Tensor> residual, Tensor seed, double p, int64_t offset) {
  return run(cxv::Dropout::kIdentity, x, nullptr, residual.has_value() ? &*residual : nullptr, seed, p, offset);
}

Tensor gelu_dropout_forward(Tensor x, Tensor seed, double p, int64_t offset) {
  return run(cxv::Dropout::kGelu, x, nullptr, nullptr, seed, p, offset);
}

Tensor gelu_dropout_backward(Tensor grad, Tensor x, Tensor seed, double p, int64_t offset) {
  return run(cxv::Dropout::kGeluGradient, grad, &x, nullptr, seed, p, offset);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CPU, m) {
  m.impl("dropout", TORCH_BOX(&dropout));
  m.impl("gelu_dropout_forward", TORCH_BOX(&gelu_dropout_forward));
  m.impl("gelu_dropout_backward", TORCH_BOX(&gelu_dropout_backward));
}
