// Dropout with a mask that is a function of seed and element, for one instruction set.
// cxv_kernels/ops/dropout/README.md defines the function.
#pragma once

#include "../core/dropout.h"
#include "simd/philox.h"
#include "simd/worker.h"

namespace cxv::CXV_ISA {

// keep[r] = 1 or 0 for the elements of one block: of word w's halves, the low one is for 16 · w + lane, the high one
// for 64 + 16 · w + lane.
CXV_INLINE void keep_block(float (&keep)[kDropoutBlock], const DropoutParams& p, uint64_t block) {
  constexpr int W = kWidth<float>;
  uint32_t words[4][16];
  philox16(words, block * 16, p.seed);
  for (int w = 0; w < 4; ++w)
    for (int lane = 0; lane < 16; lane += W) {
      Ints bits;
      std::memcpy(&bits, words[w] + lane, sizeof bits);
      const Vec<float> one = splat<float>(1), zero{};
      const Ints low = bits & 0xFFFF, high = (bits >> 16) & 0xFFFF;
      store<float>(keep + 16 * w + lane, low < p.threshold ? one : zero);
      store<float>(keep + 64 + 16 * w + lane, high < p.threshold ? one : zero);
    }
}

// Φ(x) of the standard normal distribution, and exp(-x²/2). float: within 1e-6 of Φ(x), relatively, in the tail as
// well.
CXV_INLINE Vec<float> normal_cdf(Vec<float> x, Vec<float>& density) {
  using V = Vec<float>;
  // erfc(z) = exp(-z²) t P(t) with t = 1 / (1 + z/2): a minimax polynomial, within 4.2e-8 for 0 ≤ z ≤ 9.4
  constexpr float kErfc[] = {0.282087982f, 0.282348037f,  0.243300125f, 0.201916993f,  -0.0248202737f,
                             0.275464058f, -0.484937847f, 0.283488095f, -0.0588472039f};
  const V zero{}, z = (x < zero ? -x : x) * 0.70710678f, t = splat<float>(1) / (z * 0.5f + 1.f);
  V p = splat<float>(kErfc[8]);
#pragma GCC unroll 8
  for (int i = 7; i >= 0; --i) p = p * t + kErfc[i];
  density = exp(x * x * -0.5f);
  const V tail = density * t * p * 0.5f;
  return x < zero ? tail : 1.f - tail;
}
CXV_INLINE Vec<double> normal_cdf(Vec<double> x, Vec<double>& density) {
  for (int i = 0; i < kWidth<double>; ++i) {
    density[i] = std::exp(-0.5 * x[i] * x[i]);
    x[i] = 0.5 * std::erfc(-0.70710678118654752440 * x[i]);
  }
  return x;
}

// What is dropped: x, GELU(x) = x Φ(x), or the gradient x of GELU(y) times Φ(y) + y Φ'(y).
template <DropoutParams::Map Map, class A>
CXV_INLINE Vec<A> map(Vec<A> x, Vec<A> y) {
  if constexpr (Map == DropoutParams::kIdentity) return x;
  Vec<A> density;
  if constexpr (Map == DropoutParams::kGelu) return x * normal_cdf(x, density);
  const Vec<A> cdf = normal_cdf(y, density);
  return x * (cdf + y * density * A(0.39894228040143267794));
}

template <class T, DropoutParams::Map Map>
void drop(const DropoutParams& p, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  constexpr int W = kWidth<A>;
  const T* x = static_cast<const T*>(p.x);
  const T* y = Map == DropoutParams::kGeluGradient ? static_cast<const T*>(p.activated) : x;
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  const A scale = A(65536) / A(p.threshold);
  const int64_t first = p.offset / kDropoutBlock;
  float keep[kDropoutBlock];
  for (int64_t block = first + begin; block < first + end; ++block) {
    keep_block(keep, p, block);
    // Of the block's elements the array holds [from, to).
    const int64_t base = block * kDropoutBlock - p.offset;
    const int64_t from = base < 0 ? -base : 0;
    const int64_t to = base + kDropoutBlock > p.count ? p.count - base : kDropoutBlock;
    int64_t r = from;
    if constexpr (__is_same(A, float)) {
      for (; r + W <= to; r += W) {
        Vec<A> value = map<Map, A>(load_float(x + base + r), load_float(y + base + r));
        value = value * (load<A>(keep + r) * scale);
        if (residual != nullptr) value += load_float(residual + base + r);
        store_float(out + base + r, value);
      }
    }
    for (; r < to; ++r) {
      A value = map<Map, A>(splat<A>(to_float(x[base + r])), splat<A>(to_float(y[base + r])))[0] * (A(keep[r]) * scale);
      if (residual != nullptr) value += to_float(residual[base + r]);
      from_float(value, out + base + r);
    }
  }
}

template <class T>
struct DropoutPass {
  const DropoutParams& p;
  void dropout(int64_t begin, int64_t end) const {
    if (p.map == DropoutParams::kIdentity) return drop<T, DropoutParams::kIdentity>(p, begin, end);
    if (p.map == DropoutParams::kGelu) return drop<T, DropoutParams::kGelu>(p, begin, end);
    drop<T, DropoutParams::kGeluGradient>(p, begin, end);
  }
};

}  // namespace cxv::CXV_ISA
