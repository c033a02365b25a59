#include "attention_launch.cuh"

namespace cxv {
namespace cuda {
const AttentionKernels kBFloat16Attention = kernels_of<__nv_bfloat16>();
}  // namespace cuda
}  // namespace cxv
