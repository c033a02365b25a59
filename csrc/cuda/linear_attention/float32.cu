#include "../device.cuh"

void cxv::cuda::run_float32(Call call, const LinearAttentionParams& p, const Workspace& work, const Launch& launch) {
  run<float>(call, p, work, launch);
}
