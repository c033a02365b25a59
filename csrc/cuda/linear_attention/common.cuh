// Linear attention and FAVOR+ on tensor cores, the feature map a parameter. The derivation is in
// cxv_kernels/ops/linear_attention/README.md, "CUDA: on tensor cores". In short, with z for the argument of a map (x or
// its projection) and φ = e + c:
//
//   key_pass        rows of features × columns of tokens: Σ e yᵀ and Σ e ω, relative to a running maximum per feature
//   reduce          the splits' sums in order: S and z of the keys, or R and ρ of the queries (their gradients,
//                   normalized); pack_state: U = S/z − c̄, or R, scaled to fit 16 bits
//   query_pass      rows of tokens × columns of features: out, and the statistics of a query's softmax for backward
//   query_backward  the same: grad_q; then the sums of the key pass over the queries: R and ρ
//   key_backward    the same: grad_k and grad_v
//
// The exponents of an exponential map are in base 2, and D^-¼ W contains log₂e. W is the sum of two 16-bit operands, so
// exponents are accurate to 2⁻²⁰. CUDA cores compute the products of float32. Statistics, state, sums and division are
// float32. The order of every sum depends on N, D, E and M.
//
// Torch-free: the tests run it on the host. This file has the code that the passes share.
#pragma once

#include <cmath>
#include <type_traits>

#include "../../core/linear_attention.h"
#include "../tile.cuh"

namespace cxv::cuda {

// What the kernels are instantiated for: kFavor is kFavorExact too, and kRelu is kElu.
template <FeatureMap map>
constexpr bool kProjected = map == FeatureMap::kFavor || map == FeatureMap::kFavorRelu;
template <FeatureMap map>
constexpr bool kExponential = map == FeatureMap::kFavor || map == FeatureMap::kSoftmax || map == FeatureMap::kEluExact;

// Parameters and scratch memory, an array per head: P channels (D and E, padded), M' features (M, padded to 16).
struct Work : LinearAttentionParams {
  float* partial;      // (splits, M + 1, E + 3): per feature maximum, Σ e ω, largest z, Σ e yᵀ; last Σ ιω, …, Σ ι yᵀ
  void* rows;          // (M', P) in q's dtype: U or R over `scale`
  float* weight;       // (M'): what a feature's e is weighed by: its logarithm or factor
  float* offset;       // (M'): what is added to R·v
  float* vector;       // (P + 3): c̄ or, for the keys' gradients, c Σ R/z; `scale`; c Σ z; rescaling() of z
  float* token;        // (3, queries): log₂ of Σ e or 1/Σ e, −δ, 1/den; null if the keys have no gradient
  float* feature_max;  // (blocks, warps): of performer_features
  int64_t resident_blocks;  // of the whole card: how tokens are dealt out, which changes no bit
};

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

__host__ __device__ inline int round_up_16(int64_t n) { return int((n + 15) / 16 * 16); }

// Exponents a as 2^(a − top), top the maximum; others as a / top, top the power of two up to it: nothing is divided.
template <bool exponents>
struct Relative {
  static constexpr float kNone = exponents ? -INFINITY : 0.f;
  static __device__ __forceinline__ float reference(float high) {
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

// Raises the maxima of a lane's two rows to those of `high`; if one of the warp's rises, rescale(row, factor) is for
// the sums that are relative to them.
template <class Relative, class Rescale>
__device__ __forceinline__ void raise_max(float (&running_max)[2], float (&high)[2], Rescale&& rescale) {
  bool risen = false;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    high[row] = Relative::reference(row_max(high[row]));
    risen |= high[row] > running_max[row];
  }
  if (!__any_sync(~0u, risen)) return;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float factor = Relative::factor(running_max[row], high[row]);
    running_max[row] = high[row];
    rescale(row, factor);
  }
}

// e of a map that is no exponential, and its derivative by e. Without branches, and NaN stays NaN.
template <FeatureMap map>
__device__ __forceinline__ float rectify(float z, bool elu) {
  if (map == FeatureMap::kFavorRelu) return z < 0 ? 0.f : z;
  return fmaxf(z, 0.f) + ptx::exp2(fmaf(kLog2e, z > 0 ? 0.f : z, elu ? 0.f : -INFINITY));
}
template <FeatureMap map>
__device__ __forceinline__ float rectify_gradient(float e, bool elu) {
  return map != FeatureMap::kFavorRelu && elu ? fminf(e, 1.f) : e > 0 ? 1.f : 0.f;
}

// The exponent of a map without a projection, and its derivative. elu's is log₂ φ, which does not underflow.
template <FeatureMap map>
__device__ __forceinline__ float exponent_of(float x, float scale) {
  return map != FeatureMap::kEluExact ? x * scale : x > 0 ? log2f(1 + x) : kLog2e * x;
}
template <FeatureMap map>
__device__ __forceinline__ float exponent_gradient(float x) {
  return map == FeatureMap::kEluExact && x > 0 ? 1 / (1 + x) : 1.f;
}

template <class T>
__device__ __forceinline__ T* head_ptr(const View& view, const LinearAttentionParams& p, int64_t head) {
  return static_cast<T*>(view.data) + head / p.heads * view.stride[0] + head % p.heads * view.stride[1];
}

// D^-¼, with log₂e for exponents.
template <FeatureMap map>
__device__ __forceinline__ float input_scale(const LinearAttentionParams& p) {
  if (map == FeatureMap::kRelu || map == FeatureMap::kEluExact || p.dim == 0) return 1;
  return rsqrtf(sqrtf(float(p.dim))) * (kExponential<map> ? kLog2e : 1.f);
}
// What ‖x‖² is multiplied by in the exponent, base 2.
__device__ __forceinline__ float norm_scale(const LinearAttentionParams& p) {
  return 0.5f * kLog2e * rsqrtf(float(p.dim));
}

template <FeatureMap map>
__device__ __forceinline__ float constant_of(const LinearAttentionParams& p) {
  return kProjected<map> ? float(p.eps) : 0.f;
}
// What z and eps are multiplied by, so that φ(q) z is no subnormal number: a power of two that makes the largest z of a
// head 2²⁴ to 2²⁵, or an eps that outweighs φ(q) z about 1. Results do not depend on it. For whole warps.
template <FeatureMap map>
__device__ __forceinline__ float rescaling(const LinearAttentionParams& p, const float* stat, int M) {
  if (kExponential<map>) return 1;
  float largest = 0;
  for (int m = threadIdx.x % 32; m < M; m += 32) largest = fmaxf(largest, stat[m]);
  largest = warp_max(largest);
  int exponent = 278 - int(__float_as_uint(largest) >> 23);
  if (p.feature_map == FeatureMap::kRelu && p.eps > 0) {
    const int of_eps = 254 - int(__float_as_uint(float(p.eps)) >> 23);
    exponent = of_eps < exponent ? of_eps : exponent;
  }
  return largest > 0 && largest < INFINITY ? __uint_as_float(uint32_t(exponent < 254 ? exponent : 254) << 23) : 1.f;
}
// Is S divided by z, and key_stat a logarithm?
template <FeatureMap map>
__device__ __forceinline__ bool normalized(const LinearAttentionParams& p) {
  return map == FeatureMap::kSoftmax || map == FeatureMap::kEluExact || p.feature_map == FeatureMap::kFavorExact;
}

// The two operands whose sum is W, of the pair (feature, d), (feature, d + 1); 0 beyond.
template <class T>
struct SplitPair {
  Pair<T> high, low;
  __device__ SplitPair(const LinearAttentionParams& p, float scale, int64_t feature, int d) {
    const float* W = static_cast<const float*>(p.projection) + feature * p.dim + d;
    const float x = feature < p.features && d < p.dim ? W[0] * scale : 0.f;
    const float y = feature < p.features && d + 1 < p.dim ? W[1] * scale : 0.f;
    high = pack<T>(x, y);
    const float2 rounded = unpack(high);
    low = pack<T>(x - rounded.x, y - rounded.y);
  }
};

}  // namespace cxv::cuda
