// What csrc/cuda's ops ask of CUDA's runtime; their launches come to launch_on().
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
int fake_device_capturing();
void fake_device_record(void (*run)(void*), void* data);
void fake_device_launched(void* stream);
}

namespace simt {

// What kernel<<<blocks, threads, bytes, stream>>>(arguments…) is replaced with; a stream that captures keeps it for its
// graph.
template <class Kernel, class... Arguments>
void launch_on(cudaStream_t stream, int64_t blocks, int threads, int shared_bytes, Kernel kernel,
               Arguments... arguments) {
  if (launch_observer) return launch_observer(threads, shared_bytes);
  fake_device_launched(stream);
  auto run = [=] { launch(blocks, threads, shared_bytes, launch_seed, [&] { kernel(arguments...); }); };
  if (!fake_device_capturing()) return run();
  fake_device_record([](void* data) { (*static_cast<decltype(run)*>(data))(); }, new auto(run));
}

}  // namespace simt
