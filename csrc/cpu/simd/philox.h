// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") for one instruction set.
// Torch-free.
#pragma once

#include "vec.h"

namespace cxv::CXV_ISA {

typedef uint64_t Wide __attribute__((vector_size(CXV_VECTOR_BYTES)));
inline constexpr int kLanes = CXV_VECTOR_BYTES / 8;

// The product of the low 32 bits of each lane; what is above them does not matter.
CXV_INLINE Wide multiply_low(Wide a, Wide b) {
#if CXV_VECTOR_BYTES == 64
  return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif CXV_VECTOR_BYTES == 32
  return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// words[w][i] = word w of Philox(counter first + i, key seed), for 16 counters.
CXV_INLINE void philox16(uint32_t (&words)[4][16], uint64_t first, uint64_t seed) {
  Wide lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const Wide m0 = Wide{} + 0xD2511F53u, m1 = Wide{} + 0xCD9E8D57u;
  for (int group = 0; group < 16; group += kLanes) {
    const Wide counter = lane + (first + group);
    Wide c0 = counter, c1 = counter >> 32, c2 = {}, c3 = {};
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Wide p0 = multiply_low(m0, c0), p1 = multiply_low(m1, c2);
      c0 = (p1 >> 32) ^ c1 ^ uint64_t(k0);
      c1 = p1;
      c2 = (p0 >> 32) ^ c3 ^ uint64_t(k1);
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    typedef uint32_t Narrow __attribute__((vector_size(CXV_VECTOR_BYTES / 2)));
    const Wide c[4] = {c0, c1, c2, c3};
    for (int w = 0; w < 4; ++w) {
      const Narrow low = __builtin_convertvector(c[w], Narrow);
      std::memcpy(words[w] + group, &low, sizeof low);
    }
  }
}

}  // namespace cxv::CXV_ISA
