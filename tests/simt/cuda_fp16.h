// The part of CUDA's header that the kernels use.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return static_cast<float>(y);
}
inline __half __float2half_rn(float x) {
  const _Float16 y = static_cast<_Float16>(x);
  __half z;
  std::memcpy(&z, &y, 2);
  return z;
}
