#include "../device.cuh"

void cxv::cuda::run_float16(Call call, const LinearAttentionParams& p, const Workspace& work, const Launch& launch) {
  run<__half>(call, p, work, launch);
}
