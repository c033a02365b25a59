// CUDA's machine on the host, enough to run a kernel's source as it stands: one fiber per CUDA thread, warps of 32 with
// their collectives, __syncthreads, blocks one after another. A seed shuffles which thread goes on, and the blocks.
//
// The file with the kernels is compiled with -fsanitize=thread and linked without its runtime: the calls that the
// compiler puts before every memory access come here (simt.cpp). So without a word in the kernels it is seen: a race
// (two threads on the same shared memory between barriers, one of them writing), a read of shared memory that nobody
// wrote, an access beyond the launch's shared memory or beside a tensor, a misaligned vector; and by the scheduler, a
// barrier or warp collective that not all threads reach, or that threads reach with different ones.
#pragma once

#include <bit>
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
extern Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

void __syncthreads();
float __shfl_xor_sync(unsigned mask, float value, int lanes);
float __shfl_sync(unsigned mask, float value, int lane);
int __any_sync(unsigned mask, int predicate);

namespace cxv::cuda::ptx {  // what csrc/cuda/mma.cuh writes in PTX
void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed);
void mma_m16n8k8_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b);
inline float exp2(float x) {  // ex2.approx.ftz: off by up to two units in the last place, no subnormals
  const float y = std::exp2(x);
  if (y < 0x1p-126f) return 0;
  if (x == 0 || !(y < 0x1p127f)) return y;
  const int off = int((std::bit_cast<uint32_t>(x) * 2654435761u >> 16) % 5) - 2;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(y) + off);
}
inline int forget(int x) { return x; }
inline float forget(float x) { return x; }
}  // namespace cxv::cuda::ptx

namespace simt {

// body() is what one CUDA thread does. seed 0: threads and blocks in order. Throws std::runtime_error.
void launch(int64_t blocks, int threads, int shared_bytes, unsigned seed, const std::function<void()>& body);

// Of the launches of csrc/cuda, which come to launch_on() (cuda_runtime.h): their seed, and what is called instead of
// them, if anything, with their threads and shared memory.
extern unsigned launch_seed;
extern std::function<void(int threads, int shared_bytes)> launch_observer;

// Runs f; returns what went wrong, or null.
const char* guarded(const std::function<void()>& f);

}  // namespace simt
