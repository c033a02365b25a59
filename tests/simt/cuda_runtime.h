// What csrc/cuda's ops ask of CUDA's runtime, for tests/host_gpu, where their launches come to launch_on().
#pragma once

#include "simt.h"

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

struct cudaFuncAttributes {
  int ptxVersion;
};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, Kernel) {
  of->ptxVersion = 75;
  return cudaSuccess;
}

extern "C" {
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
int host_gpu_capturing();
void host_gpu_record(void (*run)(void*), void* data);
void host_gpu_launched(void* stream);
}

namespace simt {

// What kernel<<<blocks, threads, bytes, stream>>>(arguments…) is replaced with; a stream that captures keeps it for its
// graph.
template <class Kernel, class... Arguments>
void launch_on(cudaStream_t stream, int64_t blocks, int threads, int shared_bytes, Kernel kernel,
               Arguments... arguments) {
  host_gpu_launched(stream);
  auto run = [=] { launch(blocks, threads, shared_bytes, 0, [&] { kernel(arguments...); }); };
  if (!host_gpu_capturing()) return run();
  host_gpu_record([](void* data) { (*static_cast<decltype(run)*>(data))(); }, new auto(run));
}

}  // namespace simt
