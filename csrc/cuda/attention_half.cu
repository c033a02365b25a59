#include "attention_launch.cuh"

namespace cxv {
namespace cuda {
const AttentionKernels kHalfAttention = kernels_of<__half>();
}  // namespace cuda
}  // namespace cxv

void cxv::cuda::fit_to_card(LinearAttention& p, int compute_major, int multiprocessors) {
  fit(p, compute_major, multiprocessors);
}

int64_t cxv::cuda::scratch_size(const LinearAttention& p, bool backward) {
  Work work;
  return carve(p, padded_size(p), backward, nullptr, &work);
}
