#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "attention_launch.cuh"

namespace cxv {
namespace cuda {
const AttentionKernels kHalfAttention = kernels_of<__half>();
}  // namespace cuda
}  // namespace cxv

void cxv::cuda::fit_to_card(LinearAttention& p, int multiprocessors) { fit(p, multiprocessors); }

int64_t cxv::cuda::scratch_size(const LinearAttention& p, bool backward) {
  Work work;
  return carve(p, padded_size(p), backward, nullptr, &work);
}

namespace {

int64_t cuda_compiled_for(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(torch::stable::accelerator::DeviceIndex(device));
  return cxv::cuda::kHalfAttention.compiled_for();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cxv_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_compiled_for", TORCH_BOX(&cuda_compiled_for));
}
