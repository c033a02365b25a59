// The key pass: sums over a split's tokens, rows of features × columns of tokens.
#pragma once

#include "common.cuh"

namespace cxv::cuda {

// One pass over tokens: the keys with their values, or the queries with the gradients of their results.
struct SumsSide {
  View x, y;
  int64_t tokens, splits;
};

template <class T, int P, FeatureMap map>
struct SumsShape {
  static constexpr int kTokens = sizeof(T) == 4 ? 32 : 64;          // of a tile
  static constexpr int kWarps = kProjected<map> ? 4 : P / 16;       // each with
  static constexpr int kTiles = kProjected<map> && P < 64 ? 2 : 1;  // 16 features
  static constexpr int kFeatures = 16 * kWarps * kTiles, kThreads = 32 * kWarps;
  // blocks of a multiprocessor of sm_75: 8 warps, 12 of the smallest with a projection
  static constexpr int kResident = (kProjected<map> && P == 16 && sizeof(T) == 2 ? 12 : 8) / kWarps;
  static constexpr int kBytes = 2 * Tile<T, kTokens, P>::kBytes + 3 * kTokens * 4;
  static int64_t blocks(const LinearAttentionParams& p) {
    return kProjected<map> ? (p.features + kFeatures - 1) / kFeatures : 1;
  }
};

template <class T, int P, FeatureMap map, bool queries>
__device__ __forceinline__ void sum_tokens(const Work& p, const SumsSide& side) {
  using Shape = SumsShape<T, P, map>;
  using Relative = cuda::Relative<kExponential<map>>;
  constexpr int Rows = Shape::kTokens, Tiles = Shape::kTiles, Threads = Shape::kThreads, K = P / 16;
  const int64_t feature_blocks = kProjected<map> ? (p.features + Shape::kFeatures - 1) / Shape::kFeatures : 1;
  const int64_t item = blockIdx.x / feature_blocks, head = item / side.splits;
  const bool first_block = blockIdx.x % feature_blocks == 0;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4 * 2;
  const int feature = int(blockIdx.x % feature_blocks) * Shape::kFeatures + warp * Tiles * 16;
  const bool elu = map == FeatureMap::kRelu && p.feature_map == FeatureMap::kElu;
  const float c = constant_of<map>(p);

  T* next = reinterpret_cast<T*>(shared_memory);
  const Tile<T, Rows, P> x{next, is_transposed(side.x)}, y{next + Tile<T, Rows, P>::kCount, is_transposed(side.y)};
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
  float sum[Tiles][K][2][4] = {}, weighed[Tiles][4] = {}, running_max[Tiles][2], largest[Tiles][2];
#pragma unroll
  for (int i = 0; i < 2 * Tiles; ++i) running_max[i / 2][i % 2] = Relative::kNone, largest[i / 2][i % 2] = -INFINITY;
  float plain = 0, plain_omega = 0;  // Σ ι y of a channel, Σ ιω

  const bool* mask = queries || p.key_mask == nullptr ? nullptr : p.key_mask + head / p.heads * p.mask_stride[0];
  const float* token = p.token + head * 3 * side.tokens;
  const T* const x_head = head_ptr<T>(side.x, p, head);
  const T* const y_head = head_ptr<T>(side.y, p, head);
  Transfer<T, Rows, P, Threads> x_vectors, y_vectors;
  const auto fetch = [&](int64_t tile) {
    x_vectors.fetch(side.x, x_head, tile * Rows, side.tokens, int(p.dim), mask, p.mask_stride[1]);
    y_vectors.fetch(side.y, y_head, tile * Rows, side.tokens, int(p.value_dim), mask, p.mask_stride[1]);
  };
  const TileRange<Rows> range(side.tokens, side.splits, item % side.splits);
  // A tile is under way while another is computed, where registers are left for it.
  constexpr bool kAhead = sizeof(T) == 2 && !(kProjected<map> && P == 64);
  if (kAhead && range.begin < range.end) fetch(range.begin);
  for (int64_t tile = range.begin; tile < range.end; ++tile) {
    __syncthreads();
    if (!kAhead) fetch(tile);
    x_vectors.put(x);
    y_vectors.put(y);
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * Rows; i += Threads) {
      const int row = i / 2;
      const int64_t n = tile * Rows + row;
      const bool seen = n < side.tokens && (mask == nullptr || mask[n * p.mask_stride[1]]);
      float s = kExponential<map> ? 0.f : 1.f;
      if (map == FeatureMap::kFavor && !queries) {  // two threads share a token's norm
        float squares = 0;
        for (int d = i % 2; d < P; d += 2) {
          const float z = to_float(x.at(row, d));
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
        plain = fmaf(iota[row], to_float(y.at(row, threadIdx.x % P)), plain);
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
            load_fragment<Operand::kB>(f, x.data, x.ld(), group + 16 * j, 16 * k, x.transposed);
#pragma unroll
            for (int i = 0; i < Tiles; ++i) {
              mma(a[i][j], high[i][k], f);
              if constexpr (sizeof(T) == 2) mma(a[i][j], low[i][k], f);
            }
          }
        } else {
          Pair<T> f[4];
          load_fragment<Operand::kA>(f, x.data, x.ld(), feature, group + 16 * j, !x.transposed);
          unpack_fragment(a[0][j], f);
        }
      }
      Pair<T> e[Tiles][2][4];
#pragma unroll
      for (int i = 0; i < Tiles; ++i) {
        float high_a[2] = {running_max[i][0], running_max[i][1]};
#pragma unroll
        for (int q = 0; q < 16; ++q) {
          float& z = a[i][q / 8][q / 4 % 2][q % 4];
          const float s = shift[group + q / 4 * 8 + t + q % 2];
          const int r = q / 2 % 2;
          if (map == FeatureMap::kFavor && s < INFINITY) largest[i][r] = fmaxf(largest[i][r], z);
          z = map == FeatureMap::kFavor ? z - s
              : kExponential<map>       ? exponent_of<map>(z, scale) - s
                                        : rectify<map>(z, elu) * s;
          high_a[r] = fmaxf(high_a[r], z);
        }
        raise_max<Relative>(running_max[i], high_a, [&](int row, float factor) {
          weighed[i][2 * row] *= factor;
#pragma unroll
          for (int q = 0; q < 4 * K; ++q) sum[i][q / 4][q / 2 % 2][2 * row + q % 2] *= factor;
        });
        const float base[2] = {Relative::base(running_max[i][0]), Relative::base(running_max[i][1])};
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
          load_fragment<Operand::kB>(f, y.data, y.ld(), 16 * k, group + 16 * j, !y.transposed);
#pragma unroll
          for (int i = 0; i < Tiles; ++i) mma(sum[i][k], e[i][j], f);
        }
    }
  }

  const int64_t width = p.value_dim + 3;
  float* partial = p.partial + item * (p.features + 1) * width;
#pragma unroll
  for (int i = 0; i < Tiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float own = weighed[i][2 * r], w = kOnes ? own : row_sum(own), z = row_max(largest[i][r]);
      const int64_t m = feature + i * 16 + r * 8 + g;
      if (m >= p.features) continue;
      float* record = partial + m * width;
      if (t == 0) {
        record[0] = running_max[i][r];
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

// block = (head · splits + split) · blocks of features + block of features
template <class T, int P, FeatureMap map>
__global__ void __launch_bounds__(SumsShape<T, P, map>::kThreads, SumsShape<T, P, map>::kResident)
    key_pass(const __grid_constant__ Work p, const __grid_constant__ SumsSide side) {
  sum_tokens<T, P, map, false>(p, side);
}

// As key_pass, over queries and their results' gradients: the second half of query_backward.
template <class T, int P, FeatureMap map>
__global__ void __launch_bounds__(SumsShape<T, P, map>::kThreads, SumsShape<T, P, map>::kResident)
    query_backward_sums(const __grid_constant__ Work p, const __grid_constant__ SumsSide side) {
  sum_tokens<T, P, map, true>(p, side);
}

}  // namespace cxv::cuda
