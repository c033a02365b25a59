#include "attention_launch.cuh"

namespace cxv {
namespace cuda {
const AttentionKernels kFloatAttention = kernels_of<float>();
}  // namespace cuda
}  // namespace cxv
