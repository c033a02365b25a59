// Vectors of one instruction set, with the conversions and the exponential of the kernels. Torch-free.
//
// Each instruction set (csrc/cpu/isa/*.cpp) includes this file once and defines CXV_VECTOR_BYTES and CXV_ISA, a
// namespace that keeps the symbols of the sets apart. The vector extensions of GCC and Clang compile the same source
// for all sets.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace cxv {

// Storage formats of 16 bits; arithmetic is always float.
using Half = _Float16;
struct BFloat16 {
  uint16_t bits;
};

template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace cxv

namespace cxv::CXV_ISA {

typedef float Floats __attribute__((vector_size(CXV_VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(CXV_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(CXV_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(CXV_VECTOR_BYTES)));
typedef uint16_t Shorts __attribute__((vector_size(CXV_VECTOR_BYTES / 2)));
template <class A>
using Vec = std::conditional_t<std::is_same_v<A, double>, Doubles, Floats>;
template <class A>
inline constexpr int kWidth = CXV_VECTOR_BYTES / sizeof(A);

#define CXV_INLINE inline __attribute__((always_inline))

template <class A>
CXV_INLINE Vec<A> splat(A x) {
  return x - Vec<A>{};
}
template <class A>
CXV_INLINE Vec<A> vmax(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}
template <class A>
CXV_INLINE Vec<A> load(const A* p) {
  Vec<A> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class A>
CXV_INLINE void store(A* p, Vec<A> x) {
  std::memcpy(p, &x, sizeof x);
}
// x with its elements rotated by Step.
template <class A, int Step, int... I>
CXV_INLINE Vec<A> rotate(Vec<A> x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, ((I + Step) % kWidth<A>)...);
}
// Combines all elements pairwise, in a fixed order.
template <class A, int Step = kWidth<A> / 2, class Op>
CXV_INLINE A reduce(Vec<A> x, Op op) {
  if constexpr (Step == 0) {
    return x[0];
  } else {
    return reduce<A, Step / 2>(op(x, rotate<A, Step>(x, std::make_integer_sequence<int, kWidth<A>>{})), op);
  }
}
template <class A>
CXV_INLINE A reduce_max(Vec<A> x) {
  return reduce<A>(x, [](Vec<A> a, Vec<A> b) __attribute__((always_inline)) { return vmax<A>(a, b); });
}
template <class A>
CXV_INLINE A reduce_add(Vec<A> x) {
  return reduce<A>(x, [](Vec<A> a, Vec<A> b) __attribute__((always_inline)) { return a + b; });
}

// Exchanges the upper right and the lower left of each block of 2·Step elements in two rows.
template <class A, int Step, int... I>
CXV_INLINE void exchange(Vec<A>& a, Vec<A>& b, std::integer_sequence<int, I...>) {
  const Vec<A> first = __builtin_shufflevector(a, b, (I & Step ? kWidth<A> + I - Step : I)...);
  b = __builtin_shufflevector(a, b, (I & Step ? kWidth<A> + I : I + Step)...);
  a = first;
}
// Transposes kWidth rows in registers.
template <class A, int Step = kWidth<A> / 2>
CXV_INLINE void transpose(Vec<A>* rows) {
  if constexpr (Step > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth<A>; ++i)
      if (!(i & Step)) exchange<A, Step>(rows[i], rows[i + Step], std::make_integer_sequence<int, kWidth<A>>{});
    transpose<A, Step / 2>(rows);
  }
}

// e^x. float: within 1.02 ulp wherever the result is a normal number (measured over every float), 0 below. double: the
// C library's.
CXV_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  const V low = splat<float>(-87.33654f);
  const V magic = splat<float>(12582912.f);  // 1.5 · 2^23: adding it rounds to an integer
#if CXV_VECTOR_BYTES == 64
  const V clamped = (V)_mm512_min_ps((__m512)splat<float>(89.f), (__m512)x);  // NaN stays; e^89 overflows
#else
  const V high = splat<float>(88.72283f);
  const V clamped = x > high ? high : (x < low ? low : x);
#endif
  const V shifted = clamped * 1.44269504088896341f + magic;
  const V n = shifted - magic;
  V r = clamped - n * 0.693145751953125f;  // ln 2 in two parts
  r = r - n * 1.42860682030941723212e-6f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
#if CXV_VECTOR_BYTES == 64
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);
  return (V)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  const Ints exponent = (Ints)shifted - 0x4B400000;  // n as an integer
  const Ints half = exponent >> 1;                   // 2^n in two factors: n reaches 128
  V y = p * (V)((half + 127) << 23) * (V)((exponent - half + 127) << 23);
  y = x < low ? V{} : y;
  y = x > high ? splat<float>(INFINITY) : y;
  return x != x ? x : y;
#endif
}
CXV_INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// One element to and from the accumulation type.
CXV_INLINE float to_float(float x) { return x; }
CXV_INLINE double to_float(double x) { return x; }
CXV_INLINE float to_float(BFloat16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
CXV_INLINE float to_float(Half x) { return x; }

CXV_INLINE void from_float(float x, float* p) { *p = x; }
CXV_INLINE void from_float(double x, double* p) { *p = x; }
CXV_INLINE void from_float(float x, BFloat16* p) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  p->bits = x != x ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
CXV_INLINE void from_float(float x, Half* p) { *p = Half(x); }

// kWidth elements to and from the accumulation type.
CXV_INLINE Vec<float> load_float(const float* p) { return load<float>(p); }
CXV_INLINE Vec<double> load_float(const double* p) { return load<double>(p); }
CXV_INLINE Vec<float> load_float(const BFloat16* p) {
  Shorts s;
  std::memcpy(&s, p, sizeof s);
  return (Vec<float>)(__builtin_convertvector(s, Words) << 16);
}
CXV_INLINE Vec<float> load_float(const Half* p) {
#if CXV_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif CXV_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec<float> x;
  for (int i = 0; i < kWidth<float>; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

CXV_INLINE void store_float(float* p, Vec<float> x) { store<float>(p, x); }
CXV_INLINE void store_float(double* p, Vec<double> x) { store<double>(p, x); }
CXV_INLINE void store_float(BFloat16* p, Vec<float> x) {
  const Words bits = (Words)x, rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Shorts s = __builtin_convertvector(x != x ? Words{} + 0x7FC0 : rounded, Shorts);
  std::memcpy(p, &s, sizeof s);
}
CXV_INLINE void store_float(Half* p, Vec<float> x) {
#if CXV_VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, 0));
#elif CXV_VECTOR_BYTES == 32
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 0));
#else
  for (int i = 0; i < kWidth<float>; ++i) from_float(x[i], p + i);
#endif
}

}  // namespace cxv::CXV_ISA
