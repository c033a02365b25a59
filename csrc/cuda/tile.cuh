// Tiles of tokens, and their way between global and shared memory. Torch-free.
#pragma once

#include "../core/view.h"
#include "mma.cuh"

namespace cxv::cuda {

// f(T{}) for the storage type.
template <class F>
void for_dtype(DType dtype, F&& f) {
  if (dtype == DType::kHalf) return f(__half{});
  f(float{});
}

extern __shared__ __align__(16) unsigned char shared_memory[];

constexpr int kPad = 8;  // elements after a row: eight rows of 16 bytes then lie in different banks

// Rows tokens × P channels in shared memory, as they lie in memory: a token's channels side by side, or transposed.
template <class T, int Rows, int P>
struct Tile {
  static constexpr int kCount = Rows > P ? Rows * (P + kPad) : P * (Rows + kPad);
  static constexpr int kBytes = kCount * int(sizeof(T));

  T* data;
  bool transposed;

  __device__ int ld() const { return transposed ? Rows + kPad : P + kPad; }
  __device__ T& at(int row, int channel) const {
    return data[transposed ? channel * (Rows + kPad) + row : row * (P + kPad) + channel];
  }
};

__device__ __forceinline__ bool is_transposed(const View& view) { return view.stride[2] < view.stride[3]; }

// A tile on its way between global memory and shared: 16 bytes at a time where they lie together.
template <class T, int Rows, int P, int Threads>
struct Transfer {
  static constexpr int kVector = 16 / sizeof(T), kCount = Rows * P / kVector / Threads;
  static_assert(kCount > 0 && Rows * P % (kVector * Threads) == 0);

  uint4 vector[kCount];

  // f(vector, its first row and channel)
  template <class F>
  __device__ __forceinline__ void each(bool transposed, F&& f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int c = i * Threads + threadIdx.x, line = transposed ? Rows / kVector : P / kVector;
      const int along = c % line * kVector, across = c / line;
      f(vector[i], transposed ? along : across, transposed ? across : along);
    }
  }
  // x: the element (head, 0, 0). Zeros where there is no channel, no token or, by the mask, no key.
  __device__ __forceinline__ void fetch(const View& view, const T* x, int64_t first, int64_t tokens, int channels,
                                        const bool* mask, int64_t mask_stride) {
    const bool transposed = is_transposed(view);
    const int64_t step = transposed ? view.stride[2] : view.stride[3];
    each(transposed, [&](uint4& vector, int row, int channel) {
      const int64_t n = first + row;
      const T* p = x + n * view.stride[2] + channel * view.stride[3];
      const int64_t left = transposed ? tokens - n : channels - channel;
      bool in_bounds = transposed ? channel < channels : n < tokens;
      const bool* each = mask;
      if constexpr (sizeof(T) == 2)
        if (!transposed) {  // the vector is one token's, and the mask asked once
          in_bounds = in_bounds && (mask == nullptr || mask[n * mask_stride]);
          each = nullptr;
        }
      if (in_bounds && left >= kVector && each == nullptr && step == 1 && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
        vector = *reinterpret_cast<const uint4*>(p);
        return;
      }
      union {
        uint4 all;
        uint32_t word[4];
      } out;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        out.word[w] = 0;
#pragma unroll
        for (int i = w * kVector / 4; i < (w + 1) * kVector / 4; ++i) {
          const int64_t token = transposed ? n + i : n;
          if (!in_bounds || i >= left || (each != nullptr && !each[token * mask_stride])) continue;
          if constexpr (sizeof(T) == 2)
            out.word[w] |= uint32_t(reinterpret_cast<const uint16_t*>(p)[i * step]) << 16 * (i % 2);
          else
            out.word[w] = reinterpret_cast<const uint32_t*>(p)[i * step];
        }
      }
      vector = out.all;
    });
  }
  __device__ __forceinline__ void put(const Tile<T, Rows, P>& tile) {
    each(tile.transposed,
         [&](uint4& vector, int row, int channel) { *reinterpret_cast<uint4*>(&tile.at(row, channel)) = vector; });
  }
  // The tile to global memory.
  __device__ __forceinline__ void store(const Tile<T, Rows, P>& tile, const View& view, T* x, int64_t first,
                                        int64_t tokens, int channels) {
    const int64_t step = tile.transposed ? view.stride[2] : view.stride[3];
    each(tile.transposed, [&](uint4&, int row, int channel) {
      const int64_t n = first + row;
      T* p = x + n * view.stride[2] + channel * view.stride[3];
      const int64_t left = tile.transposed ? tokens - n : channels - channel;
      if (!(tile.transposed ? channel < channels : n < tokens)) return;
      const T* from = &tile.at(row, channel);
      if (left >= kVector && step == 1 && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
        *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(from);
        return;
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (i < left) p[i * step] = from[i];
    });
  }
};

// The tokens of this block's split: tiles [begin, end) of Rows.
template <int Rows>
struct TileRange {
  int64_t begin, end;
  __device__ TileRange(int64_t tokens, int64_t splits, int64_t split) {
    const int64_t tiles = (tokens + Rows - 1) / Rows, per_split = (tiles + splits - 1) / splits;
    begin = split * per_split;
    end = begin + per_split < tiles ? begin + per_split : tiles;
  }
};

}  // namespace cxv::cuda
