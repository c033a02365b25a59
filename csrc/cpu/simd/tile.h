// Tiles in cache: moving them from and to strided tensors, and the one small matrix product. Torch-free.
#pragma once

#include "../isa/kernels.h"
#include "worker.h"

namespace cxv::CXV_ISA {

inline constexpr int kRows = 8;  // rows of a register block; tiles have a multiple of it

CXV_INLINE int64_t round_up(int64_t rows) { return (rows + kRows - 1) / kRows * kRows; }

CXV_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The tiles of one split: the same for every batch and thread count. A range, because a compiler need not inline a
// function object, and without that its loops load every captured variable again after each store.
struct Tiles {
  int64_t n, stop;
  CXV_INLINE Tiles(int64_t tokens, int64_t splits = 1, int64_t split = 0) {
    const int64_t tiles = (tokens + kTile - 1) / kTile, per_split = (tiles + splits - 1) / splits * kTile;
    n = split * per_split;
    stop = least(n + per_split, tokens);
  }
  CXV_INLINE Tiles begin() const { return *this; }
  CXV_INLINE Tiles end() const { return *this; }
  CXV_INLINE bool operator!=(const Tiles&) const { return n < stop; }
  CXV_INLINE void operator++() { n += kTile; }
  CXV_INLINE std::pair<int64_t, int64_t> operator*() const { return {n, least(stop - n, kTile)}; }  // first, tokens
};

template <class A>
void fill(A* p, int64_t n, A value = 0) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

template <class A>
void scale_row(A* row, int64_t n, A factor) {
  const Vec<A> f = splat<A>(factor);
  for (int64_t i = 0; i < n; i += kWidth<A>) store<A>(row + i, load<A>(row + i) * f);
}

// sum += the rows of x (rows × ld), in order.
template <class A>
void add_rows(A* sum, const A* x, int64_t ld, int64_t rows, int64_t cols) {
  for (int64_t c = 0; c < cols; c += kWidth<A>) {
    Vec<A> total = load<A>(sum + c);
    for (int64_t r = 0; r < rows; ++r) total += load<A>(x + r * ld + c);
    store<A>(sum + c, total);
  }
}

template <class A>
A dot(const A* a, const A* b, int64_t n) {
  Vec<A> sum{};
  for (int64_t i = 0; i < n; i += kWidth<A>) sum += load<A>(a + i) * load<A>(b + i);
  return reduce_add<A>(sum);
}

template <class A>
CXV_INLINE int64_t padded(int64_t n) {
  constexpr int64_t unit = kWidth<A> > kRows ? kWidth<A> : kRows;
  return (n + unit - 1) / unit * unit;
}

// dst (rows × ld) = scale · src; columns from cols to ld, and rows up to the next multiple of kRows, are zeros.
template <class T, class A>
void pack(A* dst, int64_t ld, Matrix<T> src, int64_t rows, int64_t cols, A scale = 1) {
  constexpr int W = kWidth<A>;
  if (src.col_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      int64_t c = 0;
      for (; c + W <= cols; c += W) store<A>(dst + r * ld + c, load_float(&src(r, c)) * scale);
      for (; c < cols; ++c) dst[r * ld + c] = to_float(src(r, c)) * scale;
      for (; c < ld; ++c) dst[r * ld + c] = 0;
    }
  } else {
    int64_t first = 0;  // of the rows that are not yet done
    if (src.row_stride == 1 && ld % W == 0)
      for (; first + W <= rows; first += W)
        for (int64_t c = 0; c < ld; c += W) {
          Vec<A> x[W];
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) x[i] = c + i < cols ? load_float(&src(first, c + i)) * scale : Vec<A>{};
          transpose<A>(x);
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) store<A>(dst + (first + i) * ld + c, x[i]);
        }
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t r = first; r < rows; ++r) dst[r * ld + c] = to_float(src(r, c)) * scale;
    for (int64_t r = first; r < rows; ++r)
      for (int64_t c = cols; c < ld; ++c) dst[r * ld + c] = 0;
  }
  for (int64_t r = rows; r % kRows != 0; ++r)
    for (int64_t c = 0; c < ld; ++c) dst[r * ld + c] = 0;
}

// dst = scale · the first rows × cols of src (rows × ld).
template <class T, class A>
void unpack(Matrix<T> dst, const A* src, int64_t ld, int64_t rows, int64_t cols, A scale = 1) {
  constexpr int W = kWidth<A>;
  if (dst.col_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      int64_t c = 0;
      for (; c + W <= cols; c += W) store_float(&dst(r, c), load<A>(src + r * ld + c) * scale);
      for (; c < cols; ++c) from_float(src[r * ld + c] * scale, &dst(r, c));
    }
  } else {
    int64_t first = 0;  // of the rows that are not yet done
    if (dst.row_stride == 1 && (cols + W - 1) / W * W <= ld)
      for (; first + W <= rows; first += W)
        for (int64_t c = 0; c < cols; c += W) {
          Vec<A> x[W];
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) x[i] = load<A>(src + (first + i) * ld + c) * scale;
          transpose<A>(x);
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i)
            if (c + i < cols) store_float(&dst(first, c + i), x[i]);
        }
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t r = first; r < rows; ++r) from_float(src[r * ld + c] * scale, &dst(r, c));
  }
}

template <int J, class A>
CXV_INLINE void product_block(A* c, int64_t ldc, const A* a, int64_t a_row, int64_t a_col, const A* b, int64_t ldb,
                              int64_t depth, bool add) {
  constexpr int W = kWidth<A>;
  Vec<A> acc[kRows][J];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) acc[i][j] = add ? load<A>(c + i * ldc + j * W) : Vec<A>{};
  for (int64_t l = 0; l < depth; ++l) {
    Vec<A> row[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) row[j] = load<A>(b + l * ldb + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec<A> x = splat<A>(a[i * a_row + l * a_col]);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) acc[i][j] += x * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) store<A>(c + i * ldc + j * W, acc[i][j]);
}

// C (rows × cols) = A·B, or += with add. A(i, l) = a[i·a_row + l·a_col], so either operand order of a tile serves;
// B (depth × cols) is row-major. rows is a multiple of kRows, cols of the vector width.
template <class A>
void product(A* c, int64_t ldc, const A* a, int64_t a_row, int64_t a_col, const A* b, int64_t ldb, int64_t rows,
             int64_t cols, int64_t depth, bool add) {
  constexpr int W = kWidth<A>;
  for (int64_t j = 0; j < cols;) {
    const bool two = CXV_VECTOR_BYTES == 64 && j + 2 * W <= cols;  // 16 accumulators need 32 registers
    for (int64_t i = 0; i < rows; i += kRows) {
      if (two)
        product_block<2>(c + i * ldc + j, ldc, a + i * a_row, a_row, a_col, b + j, ldb, depth, add);
      else
        product_block<1>(c + i * ldc + j, ldc, a + i * a_row, a_row, a_col, b + j, ldb, depth, add);
    }
    j += two ? 2 * W : W;
  }
}

}  // namespace cxv::CXV_ISA
