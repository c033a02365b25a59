// dropout and gelu_dropout on the CPU: checks and threads. On a GPU they are Triton's.
#include <torch/csrc/stable/library.h>

#include "../cpu/parallel.h"

namespace cxv {
namespace {

void check(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == x.scalar_type() && t.numel() == x.numel(),
                  "cxv_kernels: ", name, " must be contiguous and have x's size and dtype");
}

Tensor run(DropoutParams::Map map, const Tensor& x, const Tensor* activated, const Tensor* residual, const Tensor& seed,
           double p, int64_t offset) {
  STD_TORCH_CHECK(x.is_contiguous(), "cxv_kernels: x must be contiguous");
  STD_TORCH_CHECK(p >= 0 && p < 1, "cxv_kernels: p must be in [0, 1), got ", p);
  STD_TORCH_CHECK(offset >= 0, "cxv_kernels: offset must be at least 0, got ", offset);
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "cxv_kernels: seed must be one int64");
  Tensor out = torch::stable::empty_like(x);
  DropoutParams d = {};
  d.dtype = dtype_of(x);
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
  const int64_t first = offset / kDropoutBlock;
  const int64_t blocks = d.count == 0 ? 0 : (offset + d.count - 1) / kDropoutBlock - first + 1;
  run_pass(kernels().dropout, d, 0, blocks, 64);
  return out;
}

Tensor dropout(Tensor x, std::optional<Tensor> residual, Tensor seed, double p, int64_t offset) {
  return run(DropoutParams::kIdentity, x, nullptr, residual.has_value() ? &*residual : nullptr, seed, p, offset);
}

Tensor gelu_dropout_forward(Tensor x, Tensor seed, double p, int64_t offset) {
  return run(DropoutParams::kGelu, x, nullptr, nullptr, seed, p, offset);
}

Tensor gelu_dropout_backward(Tensor grad, Tensor x, Tensor seed, double p, int64_t offset) {
  return run(DropoutParams::kGeluGradient, grad, &x, nullptr, seed, p, offset);
}

}  // namespace
}  // namespace cxv

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CPU, m) {
  m.impl("dropout", TORCH_BOX(&cxv::dropout));
  m.impl("gelu_dropout_forward", TORCH_BOX(&cxv::gelu_dropout_forward));
  m.impl("gelu_dropout_backward", TORCH_BOX(&cxv::gelu_dropout_backward));
}
