// All kernels for the instruction set CXV_ISA, with the features CXV_TARGET of x86-64. The standard headers come before
// the pragma, because the whole library shares their inline functions, which must run on every CPU.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#define CXV_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define CXV_EXPANDED_PRAGMA(...) CXV_PRAGMA(__VA_ARGS__)

#if defined(__clang__)
CXV_EXPANDED_PRAGMA(clang attribute push(__attribute__((target(CXV_TARGET))), apply_to = function))
#include "all_kernels.h"
#pragma clang attribute pop
#else
#pragma GCC push_options
CXV_EXPANDED_PRAGMA(GCC target(CXV_TARGET))
#include "all_kernels.h"
#pragma GCC pop_options
#endif
