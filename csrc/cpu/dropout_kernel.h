// Dropout whose mask is a function of (seed, element), for one instruction set. cxv_kernels/dropout/README.md says
// which.
#pragma once

#include "../include/dropout.h"
#include "../include/philox.h"
#include "worker.h"

namespace cxv {
namespace CXV_ISA {

// keep[r] = 1 or 0 for the elements of one block: of word w's halves, the low one is for 16 · w + lane, the high one
// for 64 + 16 · w + lane.
CXV_INLINE void keep_block(float (&keep)[kDropoutBlock], const Dropout& p, uint64_t block) {
  using I = VecTraits<float>::Int;
  constexpr int W = kWidth<float>;
  uint32_t words[4][16];
  philox16(words, block * 16, p.seed);
  for (int w = 0; w < 4; ++w)
    for (int lane = 0; lane < 16; lane += W) {
      I bits;
      std::memcpy(&bits, words[w] + lane, sizeof bits);
      const Vec<float> one = splat<float>(1), zero{};
      const I low = bits & 0xFFFF, high = (bits >> 16) & 0xFFFF;
      store<float>(keep + 16 * w + lane, low < p.threshold ? one : zero);
      store<float>(keep + 64 + 16 * w + lane, high < p.threshold ? one : zero);
    }
}

template <class T>
void dropout(const Dropout& p, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  constexpr int W = kWidth<A>;
  const T* x = static_cast<const T*>(p.x);
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
        Vec<A> y = load_widen(x + base + r) * (load<A>(keep + r) * scale);
        if (residual != nullptr) y += load_widen(residual + base + r);
        store_narrow(out + base + r, y);
      }
    }
    for (; r < to; ++r) {
      A y = widen(x[base + r]) * (A(keep[r]) * scale);
      if (residual != nullptr) y += widen(residual[base + r]);
      narrow(y, out + base + r);
    }
  }
}

inline constexpr DropoutKernels kDropout = {
    [](const Dropout& p, int64_t begin, int64_t end) {
      for_dtype(p.dtype, [&](auto x) { dropout<decltype(x)>(p, begin, end); });
    },
};

}  // namespace CXV_ISA
}  // namespace cxv
