// The query pass, and the code that it shares with the other passes over tokens. A warp has 16 tokens in registers and
// loops over the features in shared memory: rows of tokens × columns of features.
#pragma once

#include "common.cuh"

namespace cxv::cuda {

// A pass over the tokens of queries or keys.
struct TokensSide {
  View x, y;               // y: backward's values or results' gradients
  View out_x, out_y;       // backward's gradients; out_x: query_pass's result
  int64_t tokens, blocks;  // blocks of a head
  float lower;             // 2^-raise: what came of raised weights is multiplied by it
};

// The pass that iterates over the features.
enum class Pass { kQueryPass, kBackward, kFeatures };

template <class T, int P, FeatureMap map, Pass pass>
struct TokensShape {
  static constexpr int kWarps = sizeof(T) == 4 ? 4 : 8, kThreads = 32 * kWarps, kTokens = 16 * kWarps;
  static constexpr int kMaxFeatureTile = kProjected<map> ? (P == 64 ? 64 : 128) / (sizeof(T) / 2) : P;  // of features
  static constexpr bool kRows = pass != Pass::kFeatures;
  static constexpr int kMatrices = kRows + (kProjected<map> ? (sizeof(T) == 2 ? 2 : 1) : 0);  // rows, W, W's low half
  static __host__ __device__ int feature_tile(const LinearAttentionParams& p) {
    const int padded = round_up_16(p.features);
    return padded < kMaxFeatureTile ? padded : kMaxFeatureTile;
  }
  static int bytes(const LinearAttentionParams& p) {
    return Tile<T, kTokens, P>::kBytes + feature_tile(p) * (kMatrices * (P + kPad) * int(sizeof(T)) + 2 * 4);
  }
  // Of a head: what fills the card best, if what a block does before its first tile costs as much as a tile.
  static int64_t blocks(const LinearAttentionParams& p, int64_t tokens, int64_t resident_blocks) {
    const int64_t tiles = (tokens + kTokens - 1) / kTokens;
    int64_t best = 0, least = INT64_MAX;
    for (int64_t many = 1; many <= 16; ++many) {
      const int64_t count = (tiles + many - 1) / many, all = p.batch * p.heads * count;
      const int64_t cost = (all + resident_blocks - 1) / resident_blocks * (many + 1);
      if (cost <= least) best = count, least = cost;
    }
    return best;
  }
};

template <class T, int P, FeatureMap map, Pass pass>
struct TokenTile {
  using Shape = TokensShape<T, P, map, pass>;
  static constexpr int K = P / 16, Threads = Shape::kThreads, Rows = Shape::kTokens, kLd = P + kPad;

  const Work& p;
  const int64_t head;
  const int warp, g, t, features, size;  // features: M padded; size: of a tile of them
  const float scale;
  const bool elu;
  Tile<T, Rows, P> stage;
  T *rows, *high, *low;
  float *weight, *offset;
  int loaded = -1;
  Pair<T> x[K][4];

  __device__ TokenTile(const Work& p, int64_t head)
      : p(p),
        head(head),
        warp(threadIdx.x / 32),
        g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4 * 2),
        features(round_up_16(p.features)),
        size(Shape::feature_tile(p)),
        scale(input_scale<map>(p)),
        elu(map == FeatureMap::kRelu && p.feature_map == FeatureMap::kElu) {
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
    Transfer<T, Rows, P, Threads> vectors;
    vectors.fetch(view, head_ptr<T>(view, p, head), first, tokens, channels, mask, p.mask_stride[1]);
    stage.transposed = is_transposed(view);
    __syncthreads();
    vectors.put(stage);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k)
      load_fragment<Operand::kA>(f[k], stage.data, stage.ld(), 16 * warp, 16 * k, stage.transposed);
  }
  // A tile of results, each 16 × P of a warp, f(k, half, i) one of its elements.
  template <class F>
  __device__ void store(const View& view, int64_t first, int64_t tokens, int channels, F&& f) {
    stage.transposed = is_transposed(view);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        from_float(f(k, i / 4, i % 4), &stage.at(16 * warp + g + i / 2 % 2 * 8, 16 * k + i / 4 * 8 + t + i % 2));
    __syncthreads();
    Transfer<T, Rows, P, Threads> vectors;
    vectors.store(stage, view, head_ptr<T>(view, p, head), first, tokens, channels);
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

  // f(feature in the tile, k) for each 16 features; k names x's fragment where there is no projection.
  template <class F>
  __device__ void each_group(F&& f) {
    for (int first = 0; first < features; first += size) {
      if (loaded != first) load_features(first);
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
  __device__ void load_features(int first) {
    loaded = first;
    __syncthreads();
    const int count = features - first < size ? features - first : size;
    if constexpr (Shape::kRows) {
      const T* from = static_cast<const T*>(p.rows) + head * features * P;
      constexpr int kVector = 16 / sizeof(T);
      for (int i = threadIdx.x; i < count * P / kVector; i += Threads) {
        const int row = i / (P / kVector), column = i % (P / kVector) * kVector;
        *reinterpret_cast<uint4*>(rows + row * kLd + column) =
            *reinterpret_cast<const uint4*>(from + int64_t(first + row) * P + column);
      }
      for (int i = threadIdx.x; i < count; i += Threads) {
        weight[i] = p.weight[head * features + first + i];
        if (pass == Pass::kBackward) offset[i] = p.offset[head * features + first + i];
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
        for (int i = 0; i < 8; ++i) {
          float& z = a[i / 4][i % 4];
          // Registers are short in float: each group's exponents are computed when their turn comes.
          z = exponent_of<map>(sizeof(T) == 4 ? ptx::forget(z) : z, scale);
        }
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
        load_fragment<Operand::kA>(row, stage.data, stage.ld(), 16 * warp, 16 * k, stage.transposed);
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
template <FeatureMap map>
struct QuerySums {
  using Relative = cuda::Relative<kExponential<map>>;
  float running_max[2] = {Relative::kNone, Relative::kNone}, largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  // z → e relative to the maximum; rescale(r, factor) where that rises.
  template <class Tokens, class Rescale>
  __device__ __forceinline__ void next(const Tokens& r, float (&a)[2][4], int feature, Rescale&& rescale) {
    float high[2] = {running_max[0], running_max[1]};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& z = a[i / 4][i % 4];
      const float w = r.weight_of(feature, i);
      if (map == FeatureMap::kFavor && w > -INFINITY) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], z);
      z = kExponential<map> ? z + w : rectify<map>(z, r.elu) * w;
      high[i / 2 % 2] = fmaxf(high[i / 2 % 2], z);
    }
    raise_max<Relative>(running_max, high, [&](int row, float factor) {
      sum[row] *= factor;
      rescale(row, factor);
    });
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& z = a[i / 4][i % 4];
      z = Relative::value(z, Relative::base(running_max[i / 2 % 2]));
      sum[i / 2 % 2] += z;
    }
  }

  // plain: what makes p of a sum relative to the maximum; share: Σ p; unit: 1/den, of exponential maps c Σ z/den; log,
  // of exponential maps: log₂ of the denominator in units of 2^exponent.
  float plain[2], share[2], unit[2], log[2];

  // constant: c Σ z, rescaled as z is, of exponential maps its log₂
  __device__ __forceinline__ void finish(const LinearAttentionParams& p, const float (&h)[2], float constant,
                                         float rescaled) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = row_sum(sum[r]);
      if constexpr (kExponential<map>) {
        float shift = 0;
        if (map == FeatureMap::kFavor) shift = h[r] + row_max(largest[r]);
        // An exponent of thousands has no digits left for its sum's logarithm, so `plain` does without.
        const float of_constant = constant + shift;
        const float den = sum[r] + ptx::exp2(of_constant - Relative::base(running_max[r]));
        plain[r] = den == 0 ? 0.f : 1 / den;
        log[r] = den == 0 ? INFINITY : den == INFINITY ? of_constant : Relative::base(running_max[r]) + log2f(den);
        unit[r] = ptx::exp2(of_constant - log[r]);
        share[r] = 1;
      } else {
        const float features = fmaf(running_max[r], sum[r], constant);
        const float den = features + (p.feature_map == FeatureMap::kRelu ? float(p.eps) * rescaled : 0.f);
        unit[r] = den == 0 ? 0.f : 1 / den;
        plain[r] = running_max[r] * unit[r];
        share[r] = features * unit[r];
      }
    }
  }
};

// block = head · blocks + block
template <class T, int P, FeatureMap map>
__global__ void __launch_bounds__(TokensShape<T, P, map, Pass::kQueryPass>::kThreads, 1)
    query_pass(const __grid_constant__ Work p, const __grid_constant__ TokensSide side) {
  constexpr int K = P / 16;
  using R = TokenTile<T, P, map, Pass::kQueryPass>;
  R r(p, blockIdx.x / side.blocks);
  const float* vector = p.vector + r.head * (P + 3);
  const TileRange<R::Rows> range(side.tokens, side.blocks, blockIdx.x % side.blocks);
  for (int64_t tile = range.begin; tile < range.end; ++tile) {
    r.load(r.x, side.x, tile * R::Rows, side.tokens, int(p.dim), nullptr);
    float h[2] = {0, 0}, a[2][4], sum[K][2][4] = {};
    if (map == FeatureMap::kFavor) r.half_norms(h);
    QuerySums<map> online;
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

}  // namespace cxv::cuda
