// CUDA's block model on host threads, enough to run a kernel's source as it stands: one OS thread per CUDA thread,
// std::barrier for __syncthreads, blocks one after another. Warp collectives are not emulated.
//
// What it catches: a kernel that is wrong for some schedule (threads and blocks can be started in another order and
// made to yield at random; -fsanitize=thread sees races), a barrier that not all threads reach, reading shared memory
// that was not written (NaNs), and writing beyond the shared memory that was asked for.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

struct Dim3 {
  unsigned x = 0, y = 0, z = 0;
};
extern thread_local Dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();

namespace simt {

// body() is what one CUDA thread does. seed 0: threads and blocks in order, no yields. Throws std::runtime_error.
void launch(int64_t blocks, int threads, int shared_bytes, unsigned seed, const std::function<void()>& body);

}  // namespace simt
