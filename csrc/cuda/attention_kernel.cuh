// Linear attention and FAVOR+ on tensor cores: one skeleton, the feature map its parameter. Torch-free; the tests run
// it on the host. The derivation is in cxv_kernels/linear_attention/README.md, "On tensor cores"; in short, with z for
// what a map is a function of (x, or its projection) and φ = e + c:
//
//   fold     rows of features × columns of tokens: Σ e yᵀ and Σ e ω, relative to a running maximum per feature
//   reduce   the splits' sums in order: S and z of the keys, or R and ρ of the queries (their gradients, normalized)
//   prepare  U = S/z − c̄, or R, scaled to fit 16 bits
//   read     rows of tokens × columns of features: out, and what backward needs of a query's softmax
//   grad     rows of tokens × columns of features: grad_q, or grad_k and grad_v
//
// An exponential map's exponents are in base 2, log₂e in D^-¼ W; W is the sum of two 16-bit operands, so that exponents
// are exact to 2⁻²⁰. Statistics, state, sums and division are fp32. The order of every sum follows from N, D, E and
// M.
#pragma once

#include <cmath>
#include <type_traits>

#include "../include/linear_attention.h"
#include "mma.cuh"
#include "number.cuh"

namespace cxv {
namespace cuda {

extern __shared__ __align__(16) unsigned char shared_memory[];

// kFavor with eps, or without (exact); kElu by its exponents; kRectifier is relu or, for kv_state, elu.
enum class Map { kFavor, kFavorRelu, kSoftmax, kRectifier, kElu };
template <Map map>
constexpr bool kProjected = map == Map::kFavor || map == Map::kFavorRelu;
template <Map map>
constexpr bool kExponential = map == Map::kFavor || map == Map::kSoftmax || map == Map::kElu;

// Scratch memory, an array per head: P channels (D and E, padded), M' features (M, padded to 16).
struct Work {
  float* partial;  // (splits, M + 1, E + 3): per feature maximum, Σ e ω, largest z, Σ e yᵀ; last Σ ιω, …, Σ ι yᵀ
  void* rows;      // (M', P) in q's dtype: U or R over `scale`
  float* weight;   // (M'): what a feature's e is weighed by: its logarithm or factor
  float* offset;   // (M'): what is added to R·v
  float* vector;   // (P + 3): c̄ or, for the keys' gradients, c Σ R/z; `scale`; c Σ z; rescaling() of z
  float* token;    // (3, queries): log₂ of Σ e or 1/Σ e, −δ, 1/den; null if the keys have no gradient
};

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

__host__ __device__ inline int round_up_16(int64_t n) { return int((n + 15) / 16 * 16); }

// -- Numbers relative to a maximum that may rise ----------------------------------------------------------------------

// Exponents a as 2^(a − top), top the maximum; others as a / top, top the power of two up to it: nothing is divided.
template <bool exponents>
struct Relative {
  static constexpr float kNone = exponents ? -INFINITY : 0.f;
  static __device__ __forceinline__ float top_of(float high) {
    return exponents ? high : __uint_as_float(__float_as_uint(high) & 0x7f800000u);
  }
  static __device__ __forceinline__ float base(float top) {
    return exponents ? (top == -INFINITY ? 0.f : top) : __uint_as_float(0x7f000000u - __float_as_uint(top));
  }
  static __device__ __forceinline__ float value(float a, float base) {
    return exponents ? ptx::exp2(a - base) : a * base;
  }
  // What sums relative to `old` are multiplied by to be relative to `top`.
  static __device__ __forceinline__ float factor(float old, float top) {
    return old == top ? 1.f : exponents ? ptx::exp2(old - top) : old * base(top);
  }
};

// e of a map that is no exponential, and its derivative by e. Without branches, and NaN stays NaN.
template <Map map>
__device__ __forceinline__ float rectify(float z, bool elu) {
  if (map == Map::kFavorRelu) return z < 0 ? 0.f : z;
  return fmaxf(z, 0.f) + ptx::exp2(fmaf(kLog2e, z > 0 ? 0.f : z, elu ? 0.f : -INFINITY));
}
template <Map map>
__device__ __forceinline__ float rectify_gradient(float e, bool elu) {
  return map != Map::kFavorRelu && elu ? fminf(e, 1.f) : e > 0 ? 1.f : 0.f;
}

// The exponent of a map without a projection, and its derivative. elu's is log₂ φ, which does not underflow.
template <Map map>
__device__ __forceinline__ float exponent_of(float x, float scale) {
  return map != Map::kElu ? x * scale : x > 0 ? log2f(1 + x) : kLog2e * x;
}
template <Map map>
__device__ __forceinline__ float exponent_gradient(float x) {
  return map == Map::kElu && x > 0 ? 1 / (1 + x) : 1.f;
}

// -- Tiles ------------------------------------------------------------------------------------------------------------

constexpr int kPad = 8;  // elements after a row: eight rows of 16 bytes then lie in different banks

// Rows tokens × P channels in shared memory, as they lie in memory: a token's channels side by side, or turned.
template <class T, int Rows, int P>
struct Tile {
  static constexpr int kCount = Rows > P ? Rows * (P + kPad) : P * (Rows + kPad);
  static constexpr int kBytes = kCount * int(sizeof(T));

  T* data;
  bool turned;

  __device__ int ld() const { return turned ? Rows + kPad : P + kPad; }
  __device__ T& at(int row, int channel) const {
    return data[turned ? channel * (Rows + kPad) + row : row * (P + kPad) + channel];
  }
};

__device__ __forceinline__ bool is_turned(const View& view) { return view.stride[2] < view.stride[3]; }

// A tile on its way between global memory and shared: 16 bytes at a time where they lie together.
template <class T, int Rows, int P, int Threads>
struct Transfer {
  static constexpr int kChunk = 16 / sizeof(T), kCount = Rows * P / kChunk / Threads;
  static_assert(kCount > 0 && Rows * P % (kChunk * Threads) == 0);

  uint4 chunk[kCount];

  // f(chunk, its first row and channel)
  template <class F>
  __device__ __forceinline__ void each(bool turned, F&& f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int c = i * Threads + threadIdx.x, line = turned ? Rows / kChunk : P / kChunk;
      const int along = c % line * kChunk, across = c / line;
      f(chunk[i], turned ? along : across, turned ? across : along);
    }
  }
  // x: the element (head, 0, 0). Zeros where there is no channel, no token or, by the mask, no key.
  __device__ __forceinline__ void fetch(const View& view, const T* x, int64_t first, int64_t tokens, int channels,
                                        const bool* mask, int64_t mask_stride) {
    const bool turned = is_turned(view);
    const int64_t step = turned ? view.stride[2] : view.stride[3];
    each(turned, [&](uint4& chunk, int row, int channel) {
      const int64_t n = first + row;
      const T* p = x + n * view.stride[2] + channel * view.stride[3];
      const int64_t left = turned ? tokens - n : channels - channel;
      bool there = turned ? channel < channels : n < tokens;
      const bool* each = mask;
      if constexpr (sizeof(T) == 2)
        if (!turned) {  // the chunk is one token's, and the mask asked once
          there = there && (mask == nullptr || mask[n * mask_stride]);
          each = nullptr;
        }
      if (there && left >= kChunk && each == nullptr && step == 1 && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
        chunk = *reinterpret_cast<const uint4*>(p);
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
        for (int i = w * kChunk / 4; i < (w + 1) * kChunk / 4; ++i) {
          const int64_t token = turned ? n + i : n;
          if (!there || i >= left || (each != nullptr && !each[token * mask_stride])) continue;
          if constexpr (sizeof(T) == 2)
            out.word[w] |= uint32_t(reinterpret_cast<const uint16_t*>(p)[i * step]) << 16 * (i % 2);
          else
            out.word[w] = reinterpret_cast<const uint32_t*>(p)[i * step];
        }
      }
      chunk = out.all;
    });
  }
  __device__ __forceinline__ void put(const Tile<T, Rows, P>& tile) {
    each(tile.turned,
         [&](uint4& chunk, int row, int channel) { *reinterpret_cast<uint4*>(&tile.at(row, channel)) = chunk; });
  }
  // The tile to global memory.
  __device__ __forceinline__ void store(const Tile<T, Rows, P>& tile, const View& view, T* x, int64_t first,
                                        int64_t tokens, int channels) {
    const int64_t step = tile.turned ? view.stride[2] : view.stride[3];
    each(tile.turned, [&](uint4&, int row, int channel) {
      const int64_t n = first + row;
      T* p = x + n * view.stride[2] + channel * view.stride[3];
      const int64_t left = tile.turned ? tokens - n : channels - channel;
      if (!(tile.turned ? channel < channels : n < tokens)) return;
      const T* from = &tile.at(row, channel);
      if (left >= kChunk && step == 1 && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
        *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(from);
        return;
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        if (i < left) p[i * step] = from[i];
    });
  }
};

template <class T>
__device__ __forceinline__ T* head_of(const View& view, const LinearAttention& p, int64_t head) {
  return static_cast<T*>(view.data) + head / p.heads * view.stride[0] + head % p.heads * view.stride[1];
}

// The tokens of this block's split: tiles [begin, end) of Rows.
template <int Rows>
struct Range {
  int64_t begin, end;
  __device__ Range(int64_t tokens, int64_t splits, int64_t split) {
    const int64_t tiles = (tokens + Rows - 1) / Rows, per_split = (tiles + splits - 1) / splits;
    begin = split * per_split;
    end = begin + per_split < tiles ? begin + per_split : tiles;
  }
};

// D^-¼, with log₂e for exponents.
template <Map map>
__device__ __forceinline__ float input_scale(const LinearAttention& p) {
  if (map == Map::kRectifier || map == Map::kElu || p.dim == 0) return 1;
  return rsqrtf(sqrtf(float(p.dim))) * (kExponential<map> ? kLog2e : 1.f);
}
// What ‖x‖² is multiplied by in the exponent, base 2.
__device__ __forceinline__ float norm_scale(const LinearAttention& p) { return 0.5f * kLog2e * rsqrtf(float(p.dim)); }

template <Map map>
__device__ __forceinline__ float constant_of(const LinearAttention& p) {
  return kProjected<map> ? float(p.eps) : 0.f;
}
// What z and eps are multiplied by, so that φ(q) z is no subnormal number: a power of two that makes the largest z of a
// head 2²⁴ to 2²⁵, or an eps that outweighs φ(q) z about 1. Results do not depend on it. For whole warps.
template <Map map>
__device__ __forceinline__ float rescaling(const LinearAttention& p, const float* stat, int M) {
  if (kExponential<map>) return 1;
  float top = 0;
  for (int m = threadIdx.x % 32; m < M; m += 32) top = fmaxf(top, stat[m]);
  top = warp_max(top);
  int exponent = 278 - int(__float_as_uint(top) >> 23);
  if (p.feature_map == FeatureMap::kRelu && p.eps > 0) {
    const int of_eps = 254 - int(__float_as_uint(float(p.eps)) >> 23);
    exponent = of_eps < exponent ? of_eps : exponent;
  }
  return top > 0 && top < INFINITY ? __uint_as_float(uint32_t(exponent < 254 ? exponent : 254) << 23) : 1.f;
}
// Is S divided by z, and key_stat a logarithm?
template <Map map>
__device__ __forceinline__ bool normalized(const LinearAttention& p) {
  return map == Map::kSoftmax || map == Map::kElu || p.feature_map == FeatureMap::kFavorExact;
}

// The two operands whose sum is W, of the pair (feature, d), (feature, d + 1); 0 beyond.
template <class T>
struct SplitPair {
  Pair<T> high, low;
  __device__ SplitPair(const LinearAttention& p, float scale, int64_t feature, int d) {
    const float* W = static_cast<const float*>(p.projection) + feature * p.dim + d;
    const float x = feature < p.features && d < p.dim ? W[0] * scale : 0.f;
    const float y = feature < p.features && d + 1 < p.dim ? W[1] * scale : 0.f;
    high = pack<T>(x, y);
    const float2 rounded = unpack(high);
    low = pack<T>(x - rounded.x, y - rounded.y);
  }
};

// -- fold -------------------------------------------------------------------------------------------------------------

// What one pass over tokens is told: the keys with their values, or the queries with the gradients of their results.
struct FoldSide {
  View x, y;
  int64_t tokens, splits;
};

template <class T, int P, Map map>
struct FoldShape {
  static constexpr int kTokens = sizeof(T) == 4 ? 32 : 64;          // of a tile
  static constexpr int kWarps = kProjected<map> ? 4 : P / 16;       // each with
  static constexpr int kTiles = kProjected<map> && P < 64 ? 2 : 1;  // 16 features
  static constexpr int kFeatures = 16 * kWarps * kTiles, kThreads = 32 * kWarps;
  // blocks of a multiprocessor of sm_75: 8 warps, 12 of the smallest with a projection
  static constexpr int kResident = (kProjected<map> && P == 16 && sizeof(T) == 2 ? 12 : 8) / kWarps;
  static constexpr int kBytes = 2 * Tile<T, kTokens, P>::kBytes + 3 * kTokens * 4;
  static int64_t blocks(const LinearAttention& p) {
    return kProjected<map> ? (p.features + kFeatures - 1) / kFeatures : 1;
  }
};

// block = (head · splits + split) · blocks of features + block of features
template <class T, int P, Map map, bool queries>
__global__ void __launch_bounds__(FoldShape<T, P, map>::kThreads, FoldShape<T, P, map>::kResident)
    fold(const __grid_constant__ LinearAttention p, const __grid_constant__ Work work,
         const __grid_constant__ FoldSide side) {
  using Shape = FoldShape<T, P, map>;
  using Relative = cuda::Relative<kExponential<map>>;
  constexpr int Rows = Shape::kTokens, Tiles = Shape::kTiles, Threads = Shape::kThreads, K = P / 16;
  const int64_t feature_blocks = kProjected<map> ? (p.features + Shape::kFeatures - 1) / Shape::kFeatures : 1;
  const int64_t item = blockIdx.x / feature_blocks, head = item / side.splits;
  const bool first_block = blockIdx.x % feature_blocks == 0;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4 * 2;
  const int feature = int(blockIdx.x % feature_blocks) * Shape::kFeatures + warp * Tiles * 16;
  const bool elu = map == Map::kRectifier && p.feature_map == FeatureMap::kElu;
  const float c = constant_of<map>(p);

  T* next = reinterpret_cast<T*>(shared_memory);
  const Tile<T, Rows, P> x{next, is_turned(side.x)}, y{next + Tile<T, Rows, P>::kCount, is_turned(side.y)};
  // Per token: what is subtracted from its exponents or multiplies its e; the weight ω in Σ e ω; and in Σ ι y.
  float* shift = reinterpret_cast<float*>(y.data + Tile<T, Rows, P>::kCount);
  float *omega = shift + Rows, *iota = omega + Rows;

  Pair<T> high[Tiles][K][4], low[Tiles][K][4];
  const float scale = input_scale<map>(p);
  if constexpr (kProjected<map>) {
#pragma unroll
    for (int i = 0; i < Tiles * K * 4; ++i) {
      const int tile = i / (4 * K), k = i / 4 % K, q = i % 4;
      const SplitPair<T> w(p, scale, feature + tile * 16 + g + q % 2 * 8, 16 * k + t + q / 2 * 8);
      high[tile][k][q] = w.high;
      low[tile][k][q] = w.low;
    }
  }

  // Σ e ω in a row's first column. The keys' ω are ones: a product then adds e as it is rounded for Σ e y, so that of
  // values that are equal U is 0.
  constexpr bool kOnes = sizeof(T) == 2 && !queries;
  const Pair<T> ones[4] = {pack<T>(1, 1), pack<T>(1, 1)};
  float sum[Tiles][K][2][4] = {}, weighed[Tiles][4] = {}, top[Tiles][2], largest[Tiles][2];
#pragma unroll
  for (int i = 0; i < 2 * Tiles; ++i) top[i / 2][i % 2] = Relative::kNone, largest[i / 2][i % 2] = -INFINITY;
  float plain = 0, plain_omega = 0;  // Σ ι y of a channel, Σ ιω

  const bool* mask = queries || p.key_mask == nullptr ? nullptr : p.key_mask + head / p.heads * p.mask_stride[0];
  const float* token = work.token + head * 3 * side.tokens;
  const T* const x_head = head_of<T>(side.x, p, head);
  const T* const y_head = head_of<T>(side.y, p, head);
  Transfer<T, Rows, P, Threads> x_chunks, y_chunks;
  const auto fetch = [&](int64_t tile) {
    x_chunks.fetch(side.x, x_head, tile * Rows, side.tokens, int(p.dim), mask, p.mask_stride[1]);
    y_chunks.fetch(side.y, y_head, tile * Rows, side.tokens, int(p.value_dim), mask, p.mask_stride[1]);
  };
  const Range<Rows> range(side.tokens, side.splits, item % side.splits);
  // A tile is under way while another is computed, where registers are left for it.
  constexpr bool kAhead = sizeof(T) == 2 && !(kProjected<map> && P == 64);
  if (kAhead && range.begin < range.end) fetch(range.begin);
  for (int64_t tile = range.begin; tile < range.end; ++tile) {
    __syncthreads();
    if (!kAhead) fetch(tile);
    x_chunks.put(x);
    y_chunks.put(y);
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * Rows; i += Threads) {
      const int row = i / 2;
      const int64_t n = tile * Rows + row;
      const bool seen = n < side.tokens && (mask == nullptr || mask[n * p.mask_stride[1]]);
      float s = kExponential<map> ? 0.f : 1.f;
      if (map == Map::kFavor && !queries) {  // two threads share a token's norm
        float squares = 0;
        for (int d = i % 2; d < P; d += 2) {
          const float z = widen(x.at(row, d));
          squares = fmaf(z, z, squares);
        }
        s = norm_scale(p) * (squares + __shfl_xor_sync(~0u, squares, 1));
      }
      if (i % 2 != 0) continue;
      if (queries && seen) s = token[n];
      shift[row] = seen ? s : kExponential<map> ? INFINITY : 0.f;
      omega[row] = !seen ? 0.f : queries ? token[side.tokens + n] : 1.f;
      iota[row] = !seen ? 0.f : queries ? token[2 * side.tokens + n] : 1.f;
    }
    if (kAhead && tile + 1 < range.end) fetch(tile + 1);
    __syncthreads();

    if (kProjected<map> && first_block && c != 0) {
      for (int row = threadIdx.x / P; row < Rows; row += Threads / P) {
        plain = fmaf(iota[row], widen(y.at(row, threadIdx.x % P)), plain);
        plain_omega = fmaf(iota[row], omega[row], plain_omega);
      }
    }

#pragma unroll 1
    for (int group = 0; group < Rows; group += 32) {
      float a[Tiles][2][2][4] = {};  // z of 32 tokens: 16 by 16, 8 by 8
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if constexpr (kProjected<map>) {
#pragma unroll
          for (int k = 0; k < K; ++k) {
            Pair<T> f[4];
            load_fragment<Operand::kB>(f, x.data, x.ld(), group + 16 * j, 16 * k, x.turned);
#pragma unroll
            for (int i = 0; i < Tiles; ++i) {
              mma(a[i][j], high[i][k], f);
              if constexpr (sizeof(T) == 2) mma(a[i][j], low[i][k], f);
            }
          }
        } else {
          Pair<T> f[4];
          load_fragment<Operand::kA>(f, x.data, x.ld(), feature, group + 16 * j, !x.turned);
          unpack_fragment(a[0][j], f);
        }
      }
      Pair<T> e[Tiles][2][4];
#pragma unroll
      for (int i = 0; i < Tiles; ++i) {
        float high_a[2] = {top[i][0], top[i][1]};
#pragma unroll
        for (int q = 0; q < 16; ++q) {
          float& z = a[i][q / 8][q / 4 % 2][q % 4];
          const float s = shift[group + q / 4 * 8 + t + q % 2];
          const int r = q / 2 % 2;
          if (map == Map::kFavor && s < INFINITY) largest[i][r] = fmaxf(largest[i][r], z);
          z = map == Map::kFavor  ? z - s
              : kExponential<map> ? exponent_of<map>(z, scale) - s
                                  : rectify<map>(z, elu) * s;
          high_a[r] = fmaxf(high_a[r], z);
        }
        float factor[2];
        bool risen = false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          high_a[r] = Relative::top_of(row_max(high_a[r]));
          risen |= high_a[r] > top[i][r];
        }
        if (__any_sync(~0u, risen)) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            factor[r] = Relative::factor(top[i][r], high_a[r]);
            top[i][r] = high_a[r];
            weighed[i][2 * r] *= factor[r];
          }
#pragma unroll
          for (int q = 0; q < 8 * K; ++q) sum[i][q / 8][q / 4 % 2][q % 4] *= factor[q / 2 % 2];
        }
        const float base[2] = {Relative::base(top[i][0]), Relative::base(top[i][1])};
#pragma unroll
        for (int q = 0; q < 16; ++q) {
          float& z = a[i][q / 8][q / 4 % 2][q % 4];
          z = Relative::value(z, base[q / 2 % 2]);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) pack_fragment(e[i][j], a[i][j]);
        if constexpr (kOnes) {
#pragma unroll
          for (int j = 0; j < 2; ++j) mma<0>(weighed[i], e[i][j], ones);
        } else {
#pragma unroll
          for (int q = 0; q < 16; ++q) {
            float& w = weighed[i][q / 2 % 2 * 2];
            w = fmaf(a[i][q / 8][q / 4 % 2][q % 4], omega[group + q / 4 * 8 + t + q % 2], w);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int k = 0; k < K; ++k) {
          Pair<T> f[4];
          load_fragment<Operand::kB>(f, y.data, y.ld(), 16 * k, group + 16 * j, !y.turned);
#pragma unroll
          for (int i = 0; i < Tiles; ++i) mma(sum[i][k], e[i][j], f);
        }
    }
  }

  const int64_t width = p.value_dim + 3;
  float* partial = work.partial + item * (p.features + 1) * width;
#pragma unroll
  for (int i = 0; i < Tiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float own = weighed[i][2 * r], w = kOnes ? own : row_sum(own), z = row_max(largest[i][r]);
      const int64_t m = feature + i * 16 + r * 8 + g;
      if (m >= p.features) continue;
      float* record = partial + m * width;
      if (t == 0) {
        record[0] = top[i][r];
        record[1] = w;
        record[2] = z;
      }
#pragma unroll
      for (int q = 0; q < 4 * K; ++q) {
        const int channel = q / 2 * 8 + t + q % 2;
        if (channel < p.value_dim) record[3 + channel] = sum[i][q / 4][q / 2 % 2][2 * r + q % 2];
      }
    }
  if (kProjected<map> && first_block && c != 0) {
    float* sums = reinterpret_cast<float*>(shared_memory);
    __syncthreads();
    sums[threadIdx.x] = plain;
    if (threadIdx.x % P == 0) sums[Threads + threadIdx.x / P] = plain_omega;
    __syncthreads();
    float* record = partial + p.features * width;
    if (threadIdx.x < P) {
      float total = 0, total_omega = 0;
      for (int i = 0; i < Threads / P; ++i) {
        total += sums[i * P + threadIdx.x];
        total_omega += sums[Threads + i];
      }
      if (threadIdx.x < p.value_dim) record[3 + threadIdx.x] = total;
      if (threadIdx.x == 0) record[1] = total_omega;
    }
  }
}

// -- reduce -----------------------------------------------------------------------------------------------------------

constexpr int kReduceWarps = 4, kReduceFeatures = 16;  // of a block: a warp has a feature at a time, its lanes channels
constexpr int kMaxWidth = 64;                          // of D and E

// block = head · blocks of features + block of features
template <Map map, bool queries>
__global__ void __launch_bounds__(32 * kReduceWarps)
    reduce(const __grid_constant__ LinearAttention p, const __grid_constant__ Work work,
           const __grid_constant__ FoldSide side) {
  using Relative = cuda::Relative<kExponential<map>>;
  constexpr int kChannels = kMaxWidth / 32;  // of a lane
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int M = int(p.features), E = int(p.value_dim), splits = int(side.splits), width = E + 3;
  const int blocks = (M + kReduceFeatures - 1) / kReduceFeatures, first = int(blockIdx.x % blocks) * kReduceFeatures;
  const int64_t head = blockIdx.x / blocks, size = int64_t(M + 1) * width;
  const float* partial = work.partial + head * splits * size;
  const auto record = [&](int split, int m) { return partial + split * size + m * width; };
  const float c = constant_of<map>(p);

  // FAVOR+ with eps has one maximum for all features of a head: that of z.
  float key_max = 0;
  if (map == Map::kFavor && !normalized<map>(p)) {
    if (queries) {
      key_max = static_cast<const float*>(p.key_max)[head] * kLog2e;
    } else {
      key_max = -INFINITY;
      for (int s = 0; s < splits; ++s)
        for (int m = threadIdx.x; m < M; m += 32 * kReduceWarps) key_max = fmaxf(key_max, record(s, m)[2]);
      float* tops = reinterpret_cast<float*>(shared_memory);
      key_max = warp_max(key_max);
      if (lane == 0) tops[warp] = key_max;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kReduceWarps; ++i) key_max = fmaxf(key_max, tops[i]);
      if (key_max == -INFINITY) key_max = 0;  // no key is seen
    }
  }
  if (!queries && first == 0 && threadIdx.x == 0 && p.key_max != nullptr)
    static_cast<float*>(p.key_max)[head] = key_max * kLn2;

  float plain[kChannels] = {}, plain_omega = 0;  // Σ ι y, Σ ιω
  if (c != 0)
    for (int s = 0; s < splits; ++s) {
      const float* of = record(s, M);
      plain_omega += of[1];
#pragma unroll
      for (int i = 0; i < kChannels; ++i)
        if (lane + 32 * i < E) plain[i] += of[3 + lane + 32 * i];
    }

  float total = 0;  // Σ z
  if (queries && kExponential<map> && c != 0) {
    for (int m = lane; m < M; m += 32) total += static_cast<const float*>(p.key_stat)[head * M + m];
    total = warp_sum(total);
  }
  const float rescaled = queries ? rescaling<map>(p, static_cast<const float*>(p.key_stat) + head * M, M) : 1.f;
#pragma unroll
  for (int k = 0; k < kReduceFeatures / kReduceWarps; ++k) {
    const int m = first + k * kReduceWarps + warp;
    if (m >= M) break;
    const int64_t at = head * M + m;
    float top = Relative::kNone, weighed = 0, sum[kChannels] = {};
    for (int s = 0; s < splits; ++s) top = fmaxf(top, record(s, m)[0]);
    for (int s = 0; s < splits; ++s) {
      const float* of = record(s, m);
      const float weight = Relative::factor(of[0], top);
      weighed = fmaf(weight, of[1], weighed);
#pragma unroll
      for (int i = 0; i < kChannels; ++i)
        if (lane + 32 * i < E) sum[i] = fmaf(weight, of[3 + lane + 32 * i], sum[i]);
    }

    const float stat = queries ? static_cast<const float*>(p.key_stat)[at] * rescaled : 0.f;
    // e of the feature is `unit` times what it is relative to `top`; φ is c more.
    float unit = kExponential<map> ? ptx::exp2(Relative::base(top) - key_max) : top, plain_unit = c;
    if (normalized<map>(p)) unit = weighed > 0 ? 1 / weighed : 0.f;
    if (queries) {
      if (map == Map::kSoftmax)
        unit = ptx::exp2(Relative::base(top));
      else if (normalized<map>(p))
        unit = stat == INFINITY ? 0.f : ptx::exp2(Relative::base(top) + stat * kLog2e);
      else
        unit = stat == 0 ? 0.f : kExponential<map> ? ptx::exp2(Relative::base(top) + log2f(stat)) : top * stat;
      plain_unit = c == 0 ? 0.f : !kExponential<map> ? c * stat : total > 0 ? stat / total : 0.f;
    }
    float* const matrix = static_cast<float*>(queries ? p.grad_state : p.state) + at * E;
#pragma unroll
    for (int i = 0; i < kChannels; ++i)
      if (lane + 32 * i < E) matrix[lane + 32 * i] = fmaf(unit, sum[i], plain_unit * plain[i]);
    if (lane == 0)
      static_cast<float*>(queries ? p.grad_z : p.key_stat)[at] =
          queries || !normalized<map>(p)      ? fmaf(unit, weighed, plain_unit * plain_omega)
          : weighed > 0 || weighed != weighed ? (top + log2f(weighed)) * kLn2
                                              : INFINITY;  // no key is seen
  }
}

// -- prepare ----------------------------------------------------------------------------------------------------------

// For whom: the queries read U; the keys' gradients R; those of kv_state the gradient of S itself.
enum class Role { kQueries, kKeys, kState };
struct Preparation {
  Role role;
  // Of N keys a weight e/z is at most 1, and about 1/N: 16 bits hold both ends when it is multiplied by 2^raise.
  int raise;
};

template <int P>
struct PrepareShape {
  static constexpr int kThreads = 256, kLanes = P < 32 ? P : 32, kChannels = P / kLanes;  // a feature's lanes
  static constexpr int kRows = kThreads / kLanes;                                         // features at a time
  static constexpr int kBytes = (2 * P + 2 * kRows * P + kRows + kThreads / 32) * 4;
};

// block = head
template <class T, int P, Map map>
__global__ void __launch_bounds__(PrepareShape<P>::kThreads, 1)
    prepare(const __grid_constant__ LinearAttention p, const __grid_constant__ Work work,
            const __grid_constant__ Preparation side) {
  using Shape = PrepareShape<P>;
  constexpr int Lanes = Shape::kLanes, Channels = Shape::kChannels, Rows = Shape::kRows;
  const Role role = side.role;
  const int64_t head = blockIdx.x;
  const int M = int(p.features), E = int(p.value_dim), padded = round_up_16(M);
  const int row = threadIdx.x / Lanes, lane = threadIdx.x % Lanes;
  const bool log = normalized<map>(p), keys = role != Role::kQueries;
  const float c = constant_of<map>(p);
  const float* state = static_cast<const float*>(p.state) + head * M * E;  // kState: unused
  const float* stat = static_cast<const float*>(p.key_stat) + head * M;
  const float* R = static_cast<const float*>(p.grad_state) + head * M * E;
  const float* rho = static_cast<const float*>(p.grad_z) + head * M;
  float* vector = work.vector + head * (P + 3);
  float *center = reinterpret_cast<float*>(shared_memory), *extra = center + P, *sums = extra + P;
  float *sums_of_keys = sums + Rows * P, *totals = sums_of_keys + Rows * P, *tops = totals + Rows;

  const float rescaled = role == Role::kQueries ? rescaling<map>(p, stat, M) : 1.f;
  // c̄, and c Σ R/z
  float total = 0;
  if (role != Role::kState) {
    float sum[Channels] = {}, of_keys[Channels] = {};
    for (int m = row; m < M; m += Rows) {
      const float z = log ? 1.f : stat[m];
      total += z;
#pragma unroll
      for (int i = 0; i < Channels; ++i) {
        const int e = lane + i * Lanes;
        if (e >= E) continue;
        sum[i] += state[m * E + e];
        if (keys && c != 0 && z != 0) of_keys[i] += R[m * E + e] / z;
      }
    }
#pragma unroll
    for (int i = 0; i < Channels; ++i) {
      sums[row * P + lane + i * Lanes] = sum[i];
      sums_of_keys[row * P + lane + i * Lanes] = of_keys[i];
    }
    if (lane == 0) totals[row] = total;
    __syncthreads();
    if (threadIdx.x < P) {
      float sum = 0, of_keys = 0;
      total = 0;
#pragma unroll
      for (int i = 0; i < Rows; ++i) {
        sum += sums[i * P + threadIdx.x];
        of_keys += sums_of_keys[i * P + threadIdx.x];
        total += totals[i];
      }
      center[threadIdx.x] = total != 0 ? sum / total : 0.f;
      extra[threadIdx.x] = c * of_keys;
    }
    __syncthreads();
  }

  const auto element = [&](int m, int e) {
    if (m >= M || e >= E) return 0.f;
    if (keys) return R[m * E + e];
    if (log) return stat[m] == INFINITY && map != Map::kSoftmax ? 0.f : state[m * E + e] - center[e];
    return stat[m] == 0 ? 0.f : state[m * E + e] / stat[m] - center[e];
  };
  float top = 0;
  for (int m = row; m < M; m += Rows)
#pragma unroll
    for (int i = 0; i < Channels; ++i) top = fmaxf(top, fabsf(element(m, lane + i * Lanes)));
  top = warp_max(top);
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Shape::kThreads / 32; ++i) top = fmaxf(top, tops[i]);
  const float scale = top > 0 && top < INFINITY ? exp2f(ceilf(log2f(top))) : 1.f, inverse = 1 / scale;

  T* rows = static_cast<T*>(work.rows) + head * padded * P;
  const float none = kExponential<map> ? -INFINITY : 0.f;
  for (int m = row; m < padded; m += Rows) {
    float along = 0;  // of R as rounded with c̄; the softmax pair's weights do not know z, so there ρ = −R·U
#pragma unroll
    for (int i = 0; i < Channels; ++i) {
      const int e = lane + i * Lanes;
      T* to = &rows[m * P + e];
      narrow(element(m, e) * inverse, to);
      if (keys && role != Role::kState && m < M && e < E)
        along = fmaf(widen(*to), map == Map::kSoftmax ? state[m * E + e] : center[e], along);
    }
#pragma unroll
    for (int lanes = Lanes / 2; lanes > 0; lanes /= 2) along += __shfl_xor_sync(~0u, along, lanes);
    if (lane != 0) continue;
    float weight = none, offset = 0;
    if (m < M) {
      if (!keys)
        weight = map == Map::kSoftmax ? 0.f
                 : log                ? (stat[m] == INFINITY ? none : stat[m] * kLog2e)
                 : kExponential<map>  ? (stat[m] == 0 ? none : log2f(stat[m]))
                                      : stat[m] * rescaled;
      else if (log)
        weight = float(side.raise) - stat[m] * kLog2e;
      else if (role == Role::kState)
        weight = 1;
      else if (kExponential<map>)
        weight = stat[m] == 0
                     ? none
                     : float(side.raise) - log2f(stat[m]) - static_cast<const float*>(p.key_max)[head] * kLog2e;
      else
        weight = stat[m] == 0 ? 0.f : float(1 << side.raise) / stat[m];
      if (keys) offset = (map != Map::kSoftmax || role == Role::kState ? rho[m] * inverse : 0.f) - along;
    }
    work.weight[head * padded + m] = weight;
    work.offset[head * padded + m] = offset;
  }
  if (threadIdx.x < P)
    vector[threadIdx.x] = role == Role::kState ? 0.f : keys ? extra[threadIdx.x] : center[threadIdx.x];
  if (threadIdx.x == 0) {
    vector[P] = scale;
    // Of exponential maps the logarithm: of a small c the product underflows.
    vector[P + 1] = !kExponential<map>   ? c * total * rescaled
                    : c > 0 && total > 0 ? log2f(c) + log2f(total)
                                         : -INFINITY;
    vector[P + 2] = rescaled;
  }
}

// -- read and grad: a warp has 16 tokens in registers, the features go by in shared memory ---------------------------

// A pass over the tokens of queries or keys.
struct ReadSide {
  View x, y, out_x, out_y;  // read: x, out_x. grad: y the values or the results' gradients, out_* the gradients
  int64_t tokens, blocks;   // blocks of a head
  float lower;              // 2^-raise: what came of raised weights is multiplied by it
};

// What the features go by for.
enum class Pass { kRead, kGrad, kFeatures };

template <class T, int P, Map map, Pass pass>
struct ReadShape {
  static constexpr int kWarps = sizeof(T) == 4 ? 4 : 8, kThreads = 32 * kWarps, kTokens = 16 * kWarps;
  static constexpr int kMaxChunk = kProjected<map> ? (P == 64 ? 64 : 128) / (sizeof(T) / 2) : P;  // of features
  static constexpr bool kRows = pass != Pass::kFeatures;
  static constexpr int kMatrices = kRows + (kProjected<map> ? (sizeof(T) == 2 ? 2 : 1) : 0);  // rows, W, W's low half
  static constexpr int kResident = 1;  // blocks of a multiprocessor of sm_75: 8 warps, of float 4
  static __host__ __device__ int chunk(const LinearAttention& p) {
    const int padded = round_up_16(p.features);
    return padded < kMaxChunk ? padded : kMaxChunk;
  }
  static int bytes(const LinearAttention& p) {
    return Tile<T, kTokens, P>::kBytes + chunk(p) * (kMatrices * (P + kPad) * int(sizeof(T)) + 2 * 4);
  }
  // Of a head: what fills the card best, if what a block does before its first tile costs as much as a tile.
  static int64_t blocks(const LinearAttention& p, int64_t tokens) {
    const int64_t tiles = (tokens + kTokens - 1) / kTokens;
    int64_t best = 0, least = INT64_MAX;
    for (int64_t many = 1; many <= 16; ++many) {
      const int64_t count = (tiles + many - 1) / many, all = p.batch * p.heads * count;
      const int64_t cost = (all + p.resident_blocks - 1) / p.resident_blocks * (many + 1);
      if (cost <= least) best = count, least = cost;
    }
    return best;
  }
};

template <class T, int P, Map map, Pass pass>
struct Reader {
  using Shape = ReadShape<T, P, map, pass>;
  static constexpr int K = P / 16, Threads = Shape::kThreads, Rows = Shape::kTokens, kLd = P + kPad;

  const LinearAttention& p;
  const Work& work;
  const int64_t head;
  const int warp, g, t, features, size;  // features: M padded; size: of a chunk
  const float scale;
  const bool elu;
  Tile<T, Rows, P> stage;
  T *rows, *high, *low;
  float *weight, *offset;
  int loaded = -1;
  Pair<T> x[K][4];

  __device__ Reader(const LinearAttention& p, const Work& work, int64_t head)
      : p(p),
        work(work),
        head(head),
        warp(threadIdx.x / 32),
        g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4 * 2),
        features(round_up_16(p.features)),
        size(Shape::chunk(p)),
        scale(input_scale<map>(p)),
        elu(map == Map::kRectifier && p.feature_map == FeatureMap::kElu) {
    stage.data = reinterpret_cast<T*>(shared_memory);
    rows = stage.data + Tile<T, Rows, P>::kCount;
    high = rows + (Shape::kRows ? size * kLd : 0);
    low = high + (kProjected<map> ? size * kLd : 0);
    weight = reinterpret_cast<float*>(rows + Shape::kMatrices * size * kLd);
    offset = weight + size;
  }

  // A tile of tokens into fragments.
  __device__ void load(Pair<T> (&f)[K][4], const View& view, int64_t first, int64_t tokens, int channels,
                       const bool* mask) {
    Transfer<T, Rows, P, Threads> chunks;
    chunks.fetch(view, head_of<T>(view, p, head), first, tokens, channels, mask, p.mask_stride[1]);
    stage.turned = is_turned(view);
    __syncthreads();
    chunks.put(stage);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k)
      load_fragment<Operand::kA>(f[k], stage.data, stage.ld(), 16 * warp, 16 * k, stage.turned);
  }
  // A tile of results, each 16 × P of a warp, f(k, half, i) one of its elements.
  template <class F>
  __device__ void store(const View& view, int64_t first, int64_t tokens, int channels, F&& f) {
    stage.turned = is_turned(view);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        narrow(f(k, i / 4, i % 4), &stage.at(16 * warp + g + i / 2 % 2 * 8, 16 * k + i / 4 * 8 + t + i % 2));
    __syncthreads();
    Transfer<T, Rows, P, Threads> chunks;
    chunks.store(stage, view, head_of<T>(view, p, head), first, tokens, channels);
  }

  // log₂e ‖x‖²/(2√D) of the lane's two rows.
  __device__ void half_norms(float (&h)[2]) const {
    h[0] = h[1] = 0;
#pragma unroll
    for (int i = 0; i < 4 * K; ++i) {
      const float2 z = unpack(x[i / 4][i % 4]);
      h[i % 2] = fmaf(z.x, z.x, fmaf(z.y, z.y, h[i % 2]));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) h[r] = norm_scale(p) * row_sum(h[r]);
  }

  // f(feature in the chunk, k) for each 16 features; k names x's fragment where there is no projection.
  template <class F>
  __device__ void each_group(F&& f) {
    for (int first = 0; first < features; first += size) {
      if (loaded != first) load_chunk(first);
      if constexpr (kProjected<map>) {
        const int count = features - first < size ? features - first : size;
#pragma unroll 1
        for (int i = 0; i < count; i += 16) f(i, 0);
      } else {
#pragma unroll
        for (int k = 0; k < K; ++k)
          if (16 * k < size) f(16 * k, k);
      }
    }
  }
  __device__ void load_chunk(int first) {
    loaded = first;
    __syncthreads();
    const int count = features - first < size ? features - first : size;
    if constexpr (Shape::kRows) {
      const T* from = static_cast<const T*>(work.rows) + head * features * P;
      constexpr int kChunk = 16 / sizeof(T);
      for (int i = threadIdx.x; i < count * P / kChunk; i += Threads) {
        const int row = i / (P / kChunk), column = i % (P / kChunk) * kChunk;
        *reinterpret_cast<uint4*>(rows + row * kLd + column) =
            *reinterpret_cast<const uint4*>(from + int64_t(first + row) * P + column);
      }
      for (int i = threadIdx.x; i < count; i += Threads) {
        weight[i] = work.weight[head * features + first + i];
        if (pass == Pass::kGrad) offset[i] = work.offset[head * features + first + i];
      }
    }
    if constexpr (kProjected<map>) {
      for (int i = threadIdx.x; i < count * P / 2; i += Threads) {
        const int row = i / (P / 2), d = i % (P / 2) * 2;
        const SplitPair<T> w(p, scale, first + row, d);
        *reinterpret_cast<Pair<T>*>(high + row * kLd + d) = w.high;
        if constexpr (sizeof(T) == 2) *reinterpret_cast<Pair<T>*>(low + row * kLd + d) = w.low;
      }
    }
    __syncthreads();
  }

  // z of 16 tokens × 16 features, 8 by 8, added to start(i).
  template <class F>
  __device__ void scores(float (&a)[2][4], int feature, int k, F&& start) const {
    if constexpr (kProjected<map>) {
#pragma unroll
      for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = start(i);
#pragma unroll
      for (int d = 0; d < K; ++d) {
        Pair<T> f[4];
        load_fragment<Operand::kB>(f, high, kLd, feature, 16 * d, false);
        mma(a, x[d], f);
        if constexpr (sizeof(T) == 2) {
          load_fragment<Operand::kB>(f, low, kLd, feature, 16 * d, false);
          mma(a, x[d], f);
        }
      }
    } else {
      scores(a, feature, k);
#pragma unroll
      for (int i = 0; i < 8; ++i) a[i / 4][i % 4] += start(i);
    }
  }
  __device__ void scores(float (&a)[2][4], int feature, int k) const {
    if constexpr (kProjected<map>) {
      scores(a, feature, k, [](int) { return 0.f; });
    } else {
      unpack_fragment(a, x[k]);
      if (kExponential<map>)
#pragma unroll
        for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = exponent_of<map>(a[i / 4][i % 4], scale);
    }
  }
  // y · rows of the features, added to start(i).
  template <class F>
  __device__ void products(float (&c)[2][4], const Pair<T> (&y)[K][4], int feature, F&& start) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) c[i / 4][i % 4] = start(i);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      Pair<T> f[4], row[4];
      load_fragment<Operand::kB>(f, rows, kLd, feature, 16 * k, false);
      if constexpr (sizeof(T) == 2) {
        mma(c, y[k], f);
      } else {  // registers are short, and y is still in shared memory
        load_fragment<Operand::kA>(row, stage.data, stage.ld(), 16 * warp, 16 * k, stage.turned);
        mma(c, row, f);
      }
    }
  }
  // sum += e · (matrix's rows of the features).
  __device__ void accumulate(float (&sum)[K][2][4], const float (&e)[2][4], const T* matrix, int feature) const {
    Pair<T> f[4], a[4];
    pack_fragment(a, e);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      load_fragment<Operand::kB>(f, matrix, kLd, 16 * k, feature, true);
      mma(sum[k], a, f);
    }
  }
  __device__ float weight_of(int feature, int i) const { return weight[feature + i / 4 * 8 + t + i % 2]; }
  __device__ float offset_of(int feature, int i) const { return offset[feature + i / 4 * 8 + t + i % 2]; }
};

// A query's sums over the features that go by, relative to its running maximum.
template <Map map>
struct Online {
  using Relative = cuda::Relative<kExponential<map>>;
  float top[2] = {Relative::kNone, Relative::kNone}, largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  // z → e relative to the maximum; rescale(r, factor) where that rises.
  template <class Reader, class Rescale>
  __device__ __forceinline__ void next(const Reader& r, float (&a)[2][4], int feature, Rescale&& rescale) {
    float high[2] = {top[0], top[1]};
    bool risen = false;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& z = a[i / 4][i % 4];
      const float w = r.weight_of(feature, i);
      if (map == Map::kFavor && w > -INFINITY) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], z);
      z = kExponential<map> ? z + w : rectify<map>(z, r.elu) * w;
      high[i / 2 % 2] = fmaxf(high[i / 2 % 2], z);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      high[row] = Relative::top_of(row_max(high[row]));
      risen |= high[row] > top[row];
    }
    if (__any_sync(~0u, risen)) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float factor = Relative::factor(top[row], high[row]);
        top[row] = high[row];
        sum[row] *= factor;
        rescale(row, factor);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& z = a[i / 4][i % 4];
      z = Relative::value(z, Relative::base(top[i / 2 % 2]));
      sum[i / 2 % 2] += z;
    }
  }

  // plain: what makes p of a sum relative to the maximum; share: Σ p; unit: 1/den, of exponential maps c Σ z/den; log,
  // of exponential maps: log₂ of the denominator in units of 2^exponent.
  float plain[2], share[2], unit[2], log[2];

  // constant: c Σ z, rescaled as z is, of exponential maps its log₂
  __device__ __forceinline__ void finish(const LinearAttention& p, const float (&h)[2], float constant,
                                         float rescaled) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = row_sum(sum[r]);
      if constexpr (kExponential<map>) {
        float shift = 0;
        if (map == Map::kFavor) shift = h[r] + row_max(largest[r]);
        // An exponent of thousands has no digits left for its sum's logarithm, so `plain` does without.
        const float of_constant = constant + shift;
        const float den = sum[r] + ptx::exp2(of_constant - Relative::base(top[r]));
        plain[r] = den == 0 ? 0.f : 1 / den;
        log[r] = den == 0 ? INFINITY : den == INFINITY ? of_constant : Relative::base(top[r]) + log2f(den);
        unit[r] = ptx::exp2(of_constant - log[r]);
        share[r] = 1;
      } else {
        const float features = fmaf(top[r], sum[r], constant);
        const float den = features + (p.feature_map == FeatureMap::kRelu ? float(p.eps) * rescaled : 0.f);
        unit[r] = den == 0 ? 0.f : 1 / den;
        plain[r] = top[r] * unit[r];
        share[r] = features * unit[r];
      }
    }
  }
};

// block = head · blocks + block
template <class T, int P, Map map>
__global__ void __launch_bounds__(ReadShape<T, P, map, Pass::kRead>::kThreads, 1)
    read(const __grid_constant__ LinearAttention p, const __grid_constant__ Work work,
         const __grid_constant__ ReadSide side) {
  constexpr int K = P / 16;
  using R = Reader<T, P, map, Pass::kRead>;
  R r(p, work, blockIdx.x / side.blocks);
  const float* vector = work.vector + r.head * (P + 3);
  const Range<R::Rows> range(side.tokens, side.blocks, blockIdx.x % side.blocks);
  for (int64_t tile = range.begin; tile < range.end; ++tile) {
    r.load(r.x, side.x, tile * R::Rows, side.tokens, int(p.dim), nullptr);
    float h[2] = {0, 0}, a[2][4], sum[K][2][4] = {};
    if (map == Map::kFavor) r.half_norms(h);
    Online<map> online;
    r.each_group([&](int feature, int k) {
      r.scores(a, feature, k);
      online.next(r, a, feature, [&](int row, float factor) {
#pragma unroll
        for (int i = 0; i < 4 * K; ++i) sum[i / 4][i / 2 % 2][2 * row + i % 2] *= factor;
      });
      r.accumulate(sum, a, r.rows, feature);
    });
    online.finish(p, h, vector[P + 1], vector[P + 2]);
    const float scale = vector[P];
    r.store(side.out_x, tile * R::Rows, side.tokens, int(p.value_dim), [&](int k, int half, int i) {
      const float center = vector[16 * k + 8 * half + r.t + i % 2];
      return fmaf(online.share[i / 2], center, scale * online.plain[i / 2] * sum[k][half][i]);
    });
  }
}

// Σ da W over the features that go by, each token's da relative to its largest: 16 bits hold it whatever dO's size.
template <class Reader>
struct InputGradient {
  static constexpr int K = Reader::K;
  using Relative = cuda::Relative<false>;
  float sum[K][2][4] = {}, top[2] = {0, 0};

  __device__ __forceinline__ void add(const Reader& r, float (&da)[2][4], int feature) {
    float high[2] = {top[0], top[1]};
#pragma unroll
    for (int i = 0; i < 8; ++i) high[i / 2 % 2] = fmaxf(high[i / 2 % 2], fabsf(da[i / 4][i % 4]));
    bool risen = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      high[i] = Relative::top_of(row_max(high[i]));
      risen |= high[i] > top[i];
    }
    if (__any_sync(~0u, risen)) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float factor = Relative::factor(top[i], high[i]);
        top[i] = high[i];
#pragma unroll
        for (int j = 0; j < 4 * K; ++j) sum[j / 4][j / 2 % 2][2 * i + j % 2] *= factor;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) da[i / 4][i % 4] *= Relative::base(top[i / 2 % 2]);
    r.accumulate(sum, da, r.high, feature);
  }
};

// block = head · blocks + block. Queries: grad_q, and `token` for fold. Keys: grad_k and grad_v. A gradient whose view
// has no data is not computed.
template <class T, int P, Map map, bool queries>
__global__ void __launch_bounds__(ReadShape<T, P, map, Pass::kGrad>::kThreads, 1)
    grad(const __grid_constant__ LinearAttention p, const __grid_constant__ Work work,
         const __grid_constant__ ReadSide side) {
  constexpr int K = P / 16;
  constexpr bool exponents = kExponential<map>;
  using R = Reader<T, P, map, Pass::kGrad>;
  R r(p, work, blockIdx.x / side.blocks);
  const float* vector = work.vector + r.head * (P + 3);
  const float scale = vector[P];
  const bool* mask = queries || p.key_mask == nullptr ? nullptr : p.key_mask + r.head / p.heads * p.mask_stride[0];
  const bool of_x = side.out_x.data != nullptr, of_y = side.out_y.data != nullptr;
  const Range<R::Rows> range(side.tokens, side.blocks, blockIdx.x % side.blocks);
  for (int64_t tile = range.begin; tile < range.end; ++tile) {
    Pair<T> y[K][4];
    r.load(r.x, side.x, tile * R::Rows, side.tokens, int(p.dim), mask);
    r.load(y, side.y, tile * R::Rows, side.tokens, int(p.value_dim), mask);
    const int64_t row[2] = {tile * R::Rows + 16 * r.warp + r.g, tile * R::Rows + 16 * r.warp + r.g + 8};
    float h[2] = {0, 0}, a[2][4], G[2][4] = {};
    if (map == Map::kFavor) r.half_norms(h);

    // Per token: what is subtracted from exponents; what multiplies its gradient; δ; of keys whether it is seen.
    float shift[2] = {0, 0}, factor[2] = {1, 1}, delta[2] = {0, 0}, seen[2] = {1, 1};
    if constexpr (queries) {
      Online<map> online;
      r.each_group([&](int feature, int k) {
        r.scores(a, feature, k);
        online.next(r, a, feature, [&](int row, float factor) { delta[row] *= factor; });
        r.products(G, y, feature, [](int) { return 0.f; });
#pragma unroll
        for (int i = 0; i < 8; ++i) delta[i / 2 % 2] = fmaf(a[i / 4][i % 4], G[i / 4][i % 4], delta[i / 2 % 2]);
      });
      online.finish(p, h, vector[P + 1], vector[P + 2]);
      float along[2] = {0, 0};  // dO·c̄
      if (map == Map::kRectifier)
#pragma unroll
        for (int i = 0; i < 4 * K; ++i) {
          const float2 z = unpack(y[i / 4][i % 4]);
          const int channel = i / 4 * 16 + i / 2 % 2 * 8 + r.t;
          along[i % 2] = fmaf(z.x, vector[channel], fmaf(z.y, vector[channel + 1], along[i % 2]));
        }
      float* token = work.token == nullptr ? nullptr : work.token + r.head * 3 * side.tokens;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        shift[i] = exponents ? Online<map>::Relative::base(online.top[i]) : 0.f;
        factor[i] = exponents ? online.plain[i] : online.unit[i];
        delta[i] = online.plain[i] * row_sum(delta[i]);
        if (map == Map::kRectifier) delta[i] += (online.share[i] - 1) * row_sum(along[i]) / scale;
        if (token != nullptr && r.t == 0 && row[i] < side.tokens) {
          token[row[i]] = exponents ? online.log[i] : online.unit[i];
          token[side.tokens + row[i]] = -scale * delta[i];
          token[2 * side.tokens + row[i]] = online.unit[i];
        }
      }
      if (!of_x) continue;
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (row[i] >= side.tokens || (mask != nullptr && !mask[row[i] * p.mask_stride[1]])) seen[i] = 0;
        if (exponents) shift[i] = seen[i] != 0 ? h[i] : INFINITY;
        factor[i] = seen[i] * side.lower;
      }
    }

    InputGradient<R> dx;
    float dy[K][2][4] = {}, total[2] = {0, 0};
    r.each_group([&](int feature, int k) {
      if constexpr (exponents)
        r.scores(a, feature, k, [&](int i) { return r.weight_of(feature, i) - shift[i / 2 % 2]; });
      else
        r.scores(a, feature, k);
      if (of_x) r.products(G, y, feature, [&](int i) { return queries ? -delta[i / 2 % 2] : r.offset_of(feature, i); });
      float da[2][4], plain[2][4];
      if constexpr (map == Map::kElu) unpack_fragment(plain, r.x[k]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& z = a[i / 4][i % 4];
        const float w = exponents ? 0.f : r.weight_of(feature, i);
        const float e = exponents ? ptx::exp2(z) : rectify<map>(z, r.elu);
        const float d = (exponents ? e : rectify_gradient<map>(e, r.elu) * w) * G[i / 4][i % 4];
        z = exponents ? e : e * w;
        da[i / 4][i % 4] = map == Map::kElu ? d * exponent_gradient<map>(plain[i / 4][i % 4]) : d;
        total[i / 2 % 2] += d;
      }
      if constexpr (!queries)
        if (of_y) r.accumulate(dy, a, r.rows, feature);
      if (!of_x) return;
      if constexpr (kProjected<map>) {
        dx.add(r, da, feature);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) dx.sum[k][i / 4][i % 4] = da[i / 4][i % 4];
      }
    });

    // Exponents carry log₂e, and the softmax pair's input D^-¼ too.
    const float of_features = scale * (map == Map::kSoftmax ? r.scale * kLn2 : map == Map::kFavor ? kLn2 : 1.f);
    const float of_norm = map == Map::kFavor && !(queries && normalized<map>(p)) ? scale * rsqrtf(float(p.dim)) : 0.f;
#pragma unroll
    for (int i = 0; i < 2; ++i) total[i] = row_sum(total[i]);
    if (of_x)
      r.store(side.out_x, tile * R::Rows, side.tokens, int(p.dim), [&](int k, int half, int i) {
        float d = of_features * (kProjected<map> ? dx.top[i / 2] : 1.f) * dx.sum[k][half][i];
        if (map == Map::kFavor) {
          const float2 x = unpack(r.x[k][2 * half + i / 2]);
          d -= of_norm * total[i / 2] * (i % 2 ? x.y : x.x);
        }
        return factor[i / 2] * d;
      });
    if constexpr (!queries)
      if (of_y)
        r.store(side.out_y, tile * R::Rows, side.tokens, int(p.value_dim), [&](int k, int half, int i) {
          const float plain = kProjected<map> ? seen[i / 2] * vector[16 * k + 8 * half + r.t + i % 2] : 0.f;
          return fmaf(scale * factor[i / 2], dy[k][half][i], plain);
        });
  }
}

// -- φ itself ---------------------------------------------------------------------------------------------------------

// performer_features: x (N, D) to phi (N, M), or its gradient to that of x.
struct FeaturesSide {
  View x, phi, grad_x;
  const float* key_max;  // (B, H), or null for queries
  float* block_max;      // kMax: (B, H, blocks, warps)
  int64_t tokens, blocks;
};
enum class Step { kMax, kForward, kBackward };

// block = head · blocks + block
template <class T, int P, Map map, Step step>
__global__ void __launch_bounds__(ReadShape<T, P, map, Pass::kFeatures>::kThreads, 1)
    features(const __grid_constant__ LinearAttention p, const __grid_constant__ Work work,
             const __grid_constant__ FeaturesSide side) {
  using R = Reader<T, P, map, Pass::kFeatures>;
  R r(p, work, blockIdx.x / side.blocks);
  const float c = float(p.eps), unit = map == Map::kFavor ? rsqrtf(float(p.features)) : 1.f;
  T* const phi = head_of<T>(side.phi, p, r.head);
  const Range<R::Rows> range(side.tokens, side.blocks, blockIdx.x % side.blocks);
  float largest = -INFINITY;
  for (int64_t tile = range.begin; tile < range.end; ++tile) {
    r.load(r.x, side.x, tile * R::Rows, side.tokens, int(p.dim), nullptr);
    const int64_t row[2] = {tile * R::Rows + 16 * r.warp + r.g, tile * R::Rows + 16 * r.warp + r.g + 8};
    float h[2] = {0, 0}, a[2][4], shift[2] = {0, 0};
    const auto feature_of = [&](int feature, int i) { return r.loaded + feature + i / 4 * 8 + r.t + i % 2; };
    if constexpr (map == Map::kFavor) {
      r.half_norms(h);
      // The largest exponent, which without eps is that of all of it.
      const bool keys = side.key_max != nullptr;
      if (step == Step::kMax || !keys) {
        float high[2] = {-INFINITY, -INFINITY};
        r.each_group([&](int feature, int k) {
          r.scores(a, feature, k);
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if (feature_of(feature, i) < p.features) high[i / 2 % 2] = fmaxf(high[i / 2 % 2], a[i / 4][i % 4]);
        });
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          high[i] = row_max(high[i]) - (c == 0 ? h[i] : 0.f);
          if (row[i] < side.tokens) largest = fmaxf(largest, high[i]);
          shift[i] = high[i] + h[i];
        }
      } else {
        for (int i = 0; i < 2; ++i) shift[i] = side.key_max[r.head] * kLog2e + h[i];
      }
    }
    if constexpr (step == Step::kForward) {
      r.each_group([&](int feature, int k) {
        r.scores(a, feature, k);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int at = i / 2 % 2, m = feature_of(feature, i);
          const float z = a[i / 4][i % 4], e = map == Map::kFavor ? ptx::exp2(z - shift[at]) : rectify<map>(z, false);
          if (row[at] < side.tokens && m < p.features)
            narrow((e + c) * unit, phi + row[at] * side.phi.stride[2] + m * side.phi.stride[3]);
        }
      });
    }
    if constexpr (step == Step::kBackward) {
      InputGradient<R> dx;
      float total[2] = {0, 0};
      r.each_group([&](int feature, int k) {
        r.scores(a, feature, k);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int at = i / 2 % 2, m = feature_of(feature, i);
          float& z = a[i / 4][i % 4];
          const float slope = map == Map::kFavor ? ptx::exp2(z - shift[at]) : rectify_gradient<map>(z, false);
          z = row[at] < side.tokens && m < p.features
                  ? unit * slope * widen(phi[row[at] * side.phi.stride[2] + m * side.phi.stride[3]])
                  : 0.f;
          total[at] += z;
        }
        dx.add(r, a, feature);
      });
      const float of_norm = map == Map::kFavor ? rsqrtf(float(p.dim)) : 0.f;
#pragma unroll
      for (int i = 0; i < 2; ++i) total[i] = row_sum(total[i]);
      r.store(side.grad_x, tile * R::Rows, side.tokens, int(p.dim), [&](int k, int half, int i) {
        const float2 x = unpack(r.x[k][2 * half + i / 2]);
        const float d = (map == Map::kFavor ? kLn2 : 1.f) * dx.top[i / 2] * dx.sum[k][half][i];
        return d - of_norm * total[i / 2] * (i % 2 ? x.y : x.x);
      });
    }
  }
  if constexpr (step == Step::kMax) {
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) side.block_max[blockIdx.x * (R::Threads / 32) + r.warp] = largest * kLn2;
  }
}

// -- Launches ---------------------------------------------------------------------------------------------------------

// Splits for fold, which follow from N, D, E and M: the partial states take at most an eighth of what the tokens take.
inline void fit(LinearAttention& p, int multiprocessors) {
  const int64_t widest = p.features > p.value_dim ? p.features : p.value_dim, run = 16 * (widest > 64 ? widest : 64);
  const auto splits = [run](int64_t tokens) {
    const int64_t count = (tokens + run - 1) / run;
    return count < 1 ? 1 : count > 64 ? 64 : count;
  };
  p.key_splits = splits(p.keys);
  p.query_splits = splits(p.queries);
  p.resident_blocks = multiprocessors;
}

// What the scratch arrays take, in floats; `base` (256-byte aligned) makes them, null only counts.
inline int64_t carve(const LinearAttention& p, int P, bool backward, float* base, Work* work) {
  const int64_t heads = p.batch * p.heads, padded = round_up_16(p.features);
  const int64_t splits = backward ? p.query_splits : p.key_splits;
  int64_t used = 0;
  const auto take = [&](int64_t count) {
    float* at = base == nullptr ? nullptr : base + used;
    used += (count + 63) / 64 * 64;
    return at;
  };
  const bool folded = !backward || has_key_gradients(p);
  work->partial = take(folded ? heads * splits * (p.features + 1) * (p.value_dim + 3) : 0);
  work->rows = take(heads * padded * P);  // as if floats
  work->weight = take(heads * padded);
  work->offset = take(heads * padded);
  work->vector = take(heads * (P + 3));
  work->token = backward && folded ? take(heads * 3 * p.queries) : nullptr;
  return used;
}

inline int padded_size(const LinearAttention& p) {
  const int64_t widest = p.dim > p.value_dim ? p.dim : p.value_dim;
  return widest <= 16 ? 16 : widest <= 32 ? 32 : 64;
}
// One map, dtype and size: launch(kernel, blocks, threads, bytes of shared memory, arguments…) in order.
template <class T, int P, Map map>
struct Passes {
  using Fold = FoldShape<T, P, map>;
  using Read = ReadShape<T, P, map, Pass::kRead>;
  using Grad = ReadShape<T, P, map, Pass::kGrad>;
  using Phi = ReadShape<T, P, map, Pass::kFeatures>;
  static constexpr bool kHasProjection = kProjected<map>;
  using Prepare = PrepareShape<P>;

  template <class Launch>
  static void key_state(const LinearAttention& p, const Work& work, Launch&& launch) {
    fold_and_reduce<false>(p, work, {p.k, p.v, p.keys, p.key_splits}, launch);
  }
  template <class Launch>
  static void forward(const LinearAttention& p, const Work& work, Launch&& launch) {
    key_state(p, work, launch);
    launch(prepare<T, P, map>, heads(p), Prepare::kThreads, Prepare::kBytes, Preparation{Role::kQueries, 0});
    const ReadSide side = {p.q, {}, p.out, {}, p.queries, Read::blocks(p, p.queries), 1};
    launch(read<T, P, map>, heads(p) * side.blocks, Read::kThreads, Read::bytes(p), side);
  }
  template <class Launch>
  static void backward(const LinearAttention& p, const Work& work, Launch&& launch) {
    launch(prepare<T, P, map>, heads(p), Prepare::kThreads, Prepare::kBytes, Preparation{Role::kQueries, 0});
    const ReadSide side = {p.q, p.grad_out, p.grad_q, {}, p.queries, Grad::blocks(p, p.queries), 1};
    launch(grad<T, P, map, true>, heads(p) * side.blocks, Grad::kThreads, Grad::bytes(p), side);
    if (!has_key_gradients(p)) return;
    fold_and_reduce<true>(p, work, {p.q, p.grad_out, p.queries, p.query_splits}, launch);
    key_gradients(p, work, Role::kKeys, launch);
  }
  template <class Launch>
  static void key_gradients(const LinearAttention& p, const Work& work, Role role, Launch&& launch) {
    int raise = 0;
    while (role == Role::kKeys && raise < 15 && (int64_t(2) << raise) <= p.keys) ++raise;
    launch(prepare<T, P, map>, heads(p), Prepare::kThreads, Prepare::kBytes, Preparation{role, raise});
    const ReadSide side = {p.k, p.v, p.grad_k, p.grad_v, p.keys, Grad::blocks(p, p.keys), 1 / float(1 << raise)};
    launch(grad<T, P, map, false>, heads(p) * side.blocks, Grad::kThreads, Grad::bytes(p), side);
  }

  // p has only what the features are made of; side.blocks is set here.
  template <Step step, class Launch>
  static void phi(const LinearAttention& p, const Work& work, FeaturesSide side, Launch&& launch) {
    side.blocks = Phi::blocks(p, side.tokens);
    launch(features<T, P, map, step>, heads(p) * side.blocks, Phi::kThreads, Phi::bytes(p), side);
  }

 private:
  static int64_t heads(const LinearAttention& p) { return p.batch * p.heads; }
  template <bool queries, class Launch>
  static void fold_and_reduce(const LinearAttention& p, const Work& work, const FoldSide& side, Launch&& launch) {
    launch(fold<T, P, map, queries>, heads(p) * side.splits * Fold::blocks(p), Fold::kThreads, Fold::kBytes, side);
    const int64_t blocks = (p.features + kReduceFeatures - 1) / kReduceFeatures;
    launch(reduce<map, queries>, heads(p) * blocks, 32 * kReduceWarps, 4 * kReduceWarps, side);
  }
};

// How many maxima a head leaves in features' kMax.
inline int64_t features_maxima(const LinearAttention& p) {
  using Half = ReadShape<__half, 16, Map::kFavor, Pass::kFeatures>;
  using Float = ReadShape<float, 16, Map::kFavor, Pass::kFeatures>;
  return p.dtype == DType::kFloat ? Float::blocks(p, p.queries) * Float::kWarps
                                  : Half::blocks(p, p.queries) * Half::kWarps;
}

template <class F>
void for_size(const LinearAttention& p, F&& f) {
  switch (padded_size(p)) {
    case 16:
      return f(std::integral_constant<int, 16>{});
    case 32:
      return f(std::integral_constant<int, 32>{});
    default:
      return f(std::integral_constant<int, 64>{});
  }
}
template <class F>
void for_map(FeatureMap map, F&& f) {
  switch (map) {
    case FeatureMap::kSoftmax:
      return f(std::integral_constant<Map, Map::kSoftmax>{});
    case FeatureMap::kEluExact:
      return f(std::integral_constant<Map, Map::kElu>{});
    case FeatureMap::kElu:
    case FeatureMap::kRelu:
      return f(std::integral_constant<Map, Map::kRectifier>{});
    case FeatureMap::kFavorRelu:
      return f(std::integral_constant<Map, Map::kFavorRelu>{});
    default:
      return f(std::integral_constant<Map, Map::kFavor>{});
  }
}

}  // namespace cuda
}  // namespace cxv
