#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "attention_launch.cuh"

namespace cxv {
namespace cuda {
const AttentionKernels kBFloat16Attention = kernels_of<__nv_bfloat16>();
}  // namespace cuda
}  // namespace cxv

namespace {

int64_t cuda_compiled_for(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(torch::stable::accelerator::DeviceIndex(device));
  return cxv::cuda::kBFloat16Attention.compiled_for();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_compiled_for", TORCH_BOX(&cuda_compiled_for));
}
