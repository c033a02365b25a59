// The backward passes over queries and over keys.
#pragma once

#include "query_pass.cuh"

namespace cxv::cuda {

// Σ da W over the features that go by, each token's da relative to its largest: 16 bits hold it whatever dO's size.
template <class Tokens>
struct InputGradient {
  static constexpr int K = Tokens::K;
  using Relative = cuda::Relative<false>;
  float sum[K][2][4] = {}, running_max[2] = {0, 0};

  __device__ __forceinline__ void add(const Tokens& r, float (&da)[2][4], int feature) {
    float high[2] = {running_max[0], running_max[1]};
#pragma unroll
    for (int i = 0; i < 8; ++i) high[i / 2 % 2] = fmaxf(high[i / 2 % 2], fabsf(da[i / 4][i % 4]));
    raise_max<Relative>(running_max, high, [&](int row, float factor) {
#pragma unroll
      for (int i = 0; i < 4 * K; ++i) sum[i / 4][i / 2 % 2][2 * row + i % 2] *= factor;
    });
#pragma unroll
    for (int i = 0; i < 8; ++i) da[i / 4][i % 4] *= Relative::base(running_max[i / 2 % 2]);
    r.accumulate(sum, da, r.high, feature);
  }
};

// Of queries: grad_q, and `token` for query_backward_sums. Of keys: grad_k and grad_v. A gradient whose view has no
// data is not computed.
template <class T, int P, FeatureMap map, bool queries>
__device__ __forceinline__ void differentiate(const Work& p, const TokensSide& side) {
  constexpr int K = P / 16;
  constexpr bool exponents = kExponential<map>;
  using R = TokenTile<T, P, map, Pass::kBackward>;
  R r(p, blockIdx.x / side.blocks);
  const float* vector = p.vector + r.head * (P + 3);
  const float scale = vector[P];
  const bool* mask = queries || p.key_mask == nullptr ? nullptr : p.key_mask + r.head / p.heads * p.mask_stride[0];
  const bool need_x = side.out_x.data != nullptr, need_y = side.out_y.data != nullptr;
  const TileRange<R::Rows> range(side.tokens, side.blocks, blockIdx.x % side.blocks);
  for (int64_t tile = range.begin; tile < range.end; ++tile) {
    Pair<T> y[K][4];
    r.load(r.x, side.x, tile * R::Rows, side.tokens, int(p.dim), mask);
    r.load(y, side.y, tile * R::Rows, side.tokens, int(p.value_dim), mask);
    const int64_t row[2] = {tile * R::Rows + 16 * r.warp + r.g, tile * R::Rows + 16 * r.warp + r.g + 8};
    float h[2] = {0, 0}, a[2][4], G[2][4] = {};
    if (map == FeatureMap::kFavor) r.half_norms(h);

    // Per token: what is subtracted from exponents; what multiplies its gradient; δ; of keys whether it is seen.
    float shift[2] = {0, 0}, factor[2] = {1, 1}, delta[2] = {0, 0}, seen[2] = {1, 1};
    if constexpr (queries) {
      QuerySums<map> online;
      r.each_group([&](int feature, int k) {
        r.scores(a, feature, k);
        online.next(r, a, feature, [&](int row, float factor) { delta[row] *= factor; });
        r.products(G, y, feature, [](int) { return 0.f; });
#pragma unroll
        for (int i = 0; i < 8; ++i) delta[i / 2 % 2] = fmaf(a[i / 4][i % 4], G[i / 4][i % 4], delta[i / 2 % 2]);
      });
      online.finish(p, h, vector[P + 1], vector[P + 2]);
      float along[2] = {0, 0};  // dO·c̄
      if (map == FeatureMap::kRelu)
#pragma unroll
        for (int i = 0; i < 4 * K; ++i) {
          const float2 z = unpack(y[i / 4][i % 4]);
          const int channel = i / 4 * 16 + i / 2 % 2 * 8 + r.t;
          along[i % 2] = fmaf(z.x, vector[channel], fmaf(z.y, vector[channel + 1], along[i % 2]));
        }
      float* token = p.token == nullptr ? nullptr : p.token + r.head * 3 * side.tokens;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        shift[i] = exponents ? QuerySums<map>::Relative::base(online.running_max[i]) : 0.f;
        factor[i] = exponents ? online.plain[i] : online.unit[i];
        delta[i] = online.plain[i] * row_sum(delta[i]);
        if (map == FeatureMap::kRelu) delta[i] += (online.share[i] - 1) * row_sum(along[i]) / scale;
        if (token != nullptr && r.t == 0 && row[i] < side.tokens) {
          token[row[i]] = exponents ? online.log[i] : online.unit[i];
          token[side.tokens + row[i]] = -scale * delta[i];
          token[2 * side.tokens + row[i]] = online.unit[i];
        }
      }
      if (!need_x) continue;
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
      if (need_x)
        r.products(G, y, feature, [&](int i) { return queries ? -delta[i / 2 % 2] : r.offset_of(feature, i); });
      float da[2][4], plain[2][4];
      if constexpr (map == FeatureMap::kEluExact) unpack_fragment(plain, r.x[k]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& z = a[i / 4][i % 4];
        const float w = exponents ? 0.f : r.weight_of(feature, i);
        const float e = exponents ? ptx::exp2(z) : rectify<map>(z, r.elu);
        const float d = (exponents ? e : rectify_gradient<map>(e, r.elu) * w) * G[i / 4][i % 4];
        z = exponents ? e : e * w;
        da[i / 4][i % 4] = map == FeatureMap::kEluExact ? d * exponent_gradient<map>(plain[i / 4][i % 4]) : d;
        total[i / 2 % 2] += d;
      }
      if constexpr (!queries)
        if (need_y) r.accumulate(dy, a, r.rows, feature);
      if (!need_x) return;
      if constexpr (kProjected<map>) {
        dx.add(r, da, feature);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) dx.sum[k][i / 4][i % 4] = da[i / 4][i % 4];
      }
    });

    // Exponents carry log₂e, and the softmax pair's input D^-¼ too.
    const float of_features = scale * (map == FeatureMap::kSoftmax ? r.scale * kLn2
                                       : map == FeatureMap::kFavor ? kLn2
                                                                   : 1.f);
    const float of_norm =
        map == FeatureMap::kFavor && !(queries && normalized<map>(p)) ? scale * rsqrtf(float(p.dim)) : 0.f;
#pragma unroll
    for (int i = 0; i < 2; ++i) total[i] = row_sum(total[i]);
    if (need_x)
      r.store(side.out_x, tile * R::Rows, side.tokens, int(p.dim), [&](int k, int half, int i) {
        float d = of_features * (kProjected<map> ? dx.running_max[i / 2] : 1.f) * dx.sum[k][half][i];
        if (map == FeatureMap::kFavor) {
          const float2 x = unpack(r.x[k][2 * half + i / 2]);
          d -= of_norm * total[i / 2] * (i % 2 ? x.y : x.x);
        }
        return factor[i / 2] * d;
      });
    if constexpr (!queries)
      if (need_y)
        r.store(side.out_y, tile * R::Rows, side.tokens, int(p.value_dim), [&](int k, int half, int i) {
          const float plain = kProjected<map> ? seen[i / 2] * vector[16 * k + 8 * half + r.t + i % 2] : 0.f;
          return fmaf(scale * factor[i / 2], dy[k][half][i], plain);
        });
  }
}

// block = head · blocks + block, here and below
template <class T, int P, FeatureMap map>
__global__ void __launch_bounds__(TokensShape<T, P, map, Pass::kBackward>::kThreads, 1)
    query_backward(const __grid_constant__ Work p, const __grid_constant__ TokensSide side) {
  differentiate<T, P, map, true>(p, side);
}
template <class T, int P, FeatureMap map>
__global__ void __launch_bounds__(TokensShape<T, P, map, Pass::kBackward>::kThreads, 1)
    key_backward(const __grid_constant__ Work p, const __grid_constant__ TokensSide side) {
  differentiate<T, P, map, false>(p, side);
}

}  // namespace cxv::cuda
