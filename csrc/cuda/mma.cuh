// Elements of 16 and 32 bits, and tensor cores: all PTX, and the fragments that mma reads. Without nvcc,
// tests/emulator/simt.h replaces ptx.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#ifdef __CUDACC__
namespace cxv::cuda::ptx {

// Four 8×8 matrices of 16 bits; lane l names row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  if (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void mma_m16n8k8_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// Returns x in a way that the compiler cannot analyze, so it computes dependent values again instead of keeping them.
__device__ __forceinline__ int forget(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ float forget(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace cxv::cuda::ptx
#endif

namespace cxv::cuda {

// One element to and from the number that kernels compute with.
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline void from_float(float x, float* p) { *p = x; }
__device__ inline void from_float(float x, __half* p) { *p = __float2half_rn(x); }

// Two neighboring elements of a fragment: a register of tensor cores.
template <class T>
struct Pair {
  uint32_t bits;
};
template <>
struct Pair<float> {
  float low, high;
};

template <class T>
__device__ __forceinline__ Pair<T> pack(float low, float high);
template <>
__device__ __forceinline__ Pair<float> pack<float>(float low, float high) {
  return {low, high};
}
template <>
__device__ __forceinline__ Pair<__half> pack<__half>(float low, float high) {
  const __half2 x = __floats2half2_rn(low, high);
  return {*reinterpret_cast<const uint32_t*>(&x)};
}

__device__ __forceinline__ float2 unpack(Pair<float> x) { return {x.low, x.high}; }
__device__ __forceinline__ float2 unpack(Pair<__half> x) {
  return __half22float2(*reinterpret_cast<const __half2*>(&x.bits));
}

// -- Fragments: 16×16 elements in four registers per lane -------------------------------------------------------------

// Of D = A B + C, A is 16×16 (rows × depth), B 16×16 (depth × columns; two mma of 8 columns), C and D 16×8 in fp32:
// with g = lane / 4 and t = lane % 4 the elements (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). A register holds
// one 8×8 quadrant's (g, 2t) and (g, 2t + 1), depth along the row. So two packed C of neighboring columns are an A.
enum class Operand { kA, kB };

// The fragment at (row, depth) of a tile in shared memory, which holds element (row, depth) at row·ld + depth, or
// transposed at depth·ld + row. A B has its columns for rows.
template <Operand operand, class T>
__device__ __forceinline__ void load_fragment(Pair<T> (&f)[4], const T* tile, int ld, int row, int depth,
                                              bool transposed) {
  const int lane = threadIdx.x % 32;
  constexpr int first = operand == Operand::kA ? 1 : 2;  // the bit of a quadrant's number that moves its rows
  if constexpr (sizeof(T) == 2) {
    const int quadrant = lane / 8, i = lane % 8;
    row += (quadrant & first) != 0 ? 8 : 0;
    depth += (quadrant & (3 - first)) != 0 ? 8 : 0;
    const T* p = tile + (transposed ? (depth + i) * ld + row : (row + i) * ld + depth);
    uint32_t r[4];
    ptx::ldmatrix(r, p, transposed);
#pragma unroll
    for (int q = 0; q < 4; ++q) f[q].bits = r[q];
  } else {
    ld = ptx::forget(ld);  // a kernel has dozens of these addresses
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int i = row + lane / 4 + ((q & first) != 0 ? 8 : 0);
      const int j = depth + lane % 4 * 2 + ((q & (3 - first)) != 0 ? 8 : 0);
      f[q] = transposed ? Pair<T>{tile[j * ld + i], tile[(j + 1) * ld + i]}
                        : Pair<T>{tile[i * ld + j], tile[i * ld + j + 1]};
    }
  }
}

// c += A B for 8 of B's columns: half 0 or 1.
template <int half>
__device__ __forceinline__ void mma(float (&c)[4], const Pair<__half> (&a)[4], const Pair<__half> (&b)[4]) {
  ptx::mma_m16n8k8_f16(c, a[0].bits, a[1].bits, b[2 * half].bits);
  ptx::mma_m16n8k8_f16(c, a[2].bits, a[3].bits, b[2 * half + 1].bits);
}
// The same on CUDA cores, with shuffles in place of a tensor core. Correct but slow.
template <int half>
__device__ __forceinline__ void mma(float (&c)[4], const Pair<float> (&a)[4], const Pair<float> (&b)[4]) {
  const int lane = threadIdx.x % 32, row = lane / 4 * 4, column = lane % 4 * 8;
#pragma unroll 1  // a kernel has dozens of it
  for (int from = 0; from < 4; ++from) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Pair<float> top = a[k / 2 * 2], bottom = a[k / 2 * 2 + 1], x = b[2 * half + k / 2];
      const float t = __shfl_sync(~0u, k % 2 ? top.high : top.low, row + from);
      const float u = __shfl_sync(~0u, k % 2 ? bottom.high : bottom.low, row + from);
      const float left = __shfl_sync(~0u, k % 2 ? x.high : x.low, column + from);
      const float right = __shfl_sync(~0u, k % 2 ? x.high : x.low, column + 4 + from);
      c[0] = fmaf(t, left, c[0]);
      c[1] = fmaf(t, right, c[1]);
      c[2] = fmaf(u, left, c[2]);
      c[3] = fmaf(u, right, c[3]);
    }
  }
}
// All 16 columns.
template <class T>
__device__ __forceinline__ void mma(float (&c)[2][4], const Pair<T> (&a)[4], const Pair<T> (&b)[4]) {
  mma<0>(c[0], a, b);
  mma<1>(c[1], a, b);
}
// Two D of neighboring columns as an A.
template <class T>
__device__ __forceinline__ void pack_fragment(Pair<T> (&f)[4], const float (&c)[2][4]) {
#pragma unroll
  for (int q = 0; q < 4; ++q) f[q] = pack<T>(c[q / 2][q % 2 * 2], c[q / 2][q % 2 * 2 + 1]);
}
// An A as two D.
template <class T>
__device__ __forceinline__ void unpack_fragment(float (&c)[2][4], const Pair<T> (&f)[4]) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const float2 x = unpack(f[q]);
    c[q / 2][q % 2 * 2] = x.x;
    c[q / 2][q % 2 * 2 + 1] = x.y;
  }
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}
// Over the four lanes that share a row of D.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

}  // namespace cxv::cuda
