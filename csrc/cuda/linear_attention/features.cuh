// performer_features: φ itself, and its gradient.
#pragma once

#include "backward.cuh"

namespace cxv::cuda {

// performer_features: x is p.q, φ p.out, or its gradient p.grad_out and x's p.grad_q.
enum class Step { kMax, kForward, kBackward };

// block = head · blocks + block
template <class T, int P, FeatureMap map, Step step>
__global__ void __launch_bounds__(TokensShape<T, P, map, Pass::kFeatures>::kThreads, 1)
    features(const __grid_constant__ Work p, const __grid_constant__ int64_t blocks) {
  using R = TokenTile<T, P, map, Pass::kFeatures>;
  R r(p, blockIdx.x / blocks);
  const float c = float(p.eps), unit = map == FeatureMap::kFavor ? rsqrtf(float(p.features)) : 1.f;
  const float* key_max = static_cast<const float*>(p.key_max);
  const View& phi_view = step == Step::kBackward ? p.grad_out : p.out;
  T* const phi = head_ptr<T>(phi_view, p, r.head);
  const TileRange<R::Rows> range(p.queries, blocks, blockIdx.x % blocks);
  float largest = -INFINITY;
  for (int64_t tile = range.begin; tile < range.end; ++tile) {
    r.load(r.x, p.q, tile * R::Rows, p.queries, int(p.dim), nullptr);
    const int64_t row[2] = {tile * R::Rows + 16 * r.warp + r.g, tile * R::Rows + 16 * r.warp + r.g + 8};
    float h[2] = {0, 0}, a[2][4], shift[2] = {0, 0};
    const auto feature_of = [&](int feature, int i) { return r.loaded + feature + i / 4 * 8 + r.t + i % 2; };
    if constexpr (map == FeatureMap::kFavor) {
      r.half_norms(h);
      // The largest exponent, which without eps is that of all of it.
      const bool keys = key_max != nullptr;
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
          if (row[i] < p.queries) largest = fmaxf(largest, high[i]);
          shift[i] = high[i] + h[i];
        }
      } else {
        for (int i = 0; i < 2; ++i) shift[i] = key_max[r.head] * kLog2e + h[i];
      }
    }
    if constexpr (step == Step::kForward) {
      r.each_group([&](int feature, int k) {
        r.scores(a, feature, k);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int at = i / 2 % 2, m = feature_of(feature, i);
          const float z = a[i / 4][i % 4],
                      e = map == FeatureMap::kFavor ? ptx::exp2(z - shift[at]) : rectify<map>(z, false);
          if (row[at] < p.queries && m < p.features)
            from_float((e + c) * unit, phi + row[at] * phi_view.stride[2] + m * phi_view.stride[3]);
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
          const float slope = map == FeatureMap::kFavor ? ptx::exp2(z - shift[at]) : rectify_gradient<map>(z, false);
          z = row[at] < p.queries && m < p.features
                  ? unit * slope * to_float(phi[row[at] * phi_view.stride[2] + m * phi_view.stride[3]])
                  : 0.f;
          total[at] += z;
        }
        dx.add(r, a, feature);
      });
      const float of_norm = map == FeatureMap::kFavor ? rsqrtf(float(p.dim)) : 0.f;
#pragma unroll
      for (int i = 0; i < 2; ++i) total[i] = row_sum(total[i]);
      r.store(p.grad_q, tile * R::Rows, p.queries, int(p.dim), [&](int k, int half, int i) {
        const float2 x = unpack(r.x[k][2 * half + i / 2]);
        const float d = (map == FeatureMap::kFavor ? kLn2 : 1.f) * dx.running_max[i / 2] * dx.sum[k][half][i];
        return d - of_norm * total[i / 2] * (i % 2 ? x.y : x.x);
      });
    }
  }
  if constexpr (step == Step::kMax) {
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) p.feature_max[blockIdx.x * (R::Threads / 32) + r.warp] = largest * kLn2;
  }
}

}  // namespace cxv::cuda
