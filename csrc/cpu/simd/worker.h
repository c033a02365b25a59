// What the passes of every op share: one worker's memory, and a case per dtype. Torch-free.
#pragma once

#include "vec.h"
#include "../../core/view.h"

namespace cxv::CXV_ISA {

// Rows and columns of a tensor in memory.
template <class T>
struct Matrix {
  T* data;
  int64_t row_stride, col_stride;
  Matrix transposed() const { return {data, col_stride, row_stride}; }
  T& operator()(int64_t row, int64_t col) const { return data[row * row_stride + col * col_stride]; }
};

// The rows of one of all heads, from `first` on.
template <class T, class Params>
Matrix<T> rows_of(const Params& p, const View& view, int64_t head, int64_t first = 0) {
  T* const data = static_cast<T*>(view.data) + head / p.heads * view.stride[0] + head % p.heads * view.stride[1];
  return {data + first * view.stride[2], view.stride[2], view.stride[3]};
}

// Zeroed, aligned memory for the tiles of one worker.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t count) : raw_(new A[count + kWidth<A>]()) {
    next_ = raw_ + (CXV_VECTOR_BYTES - reinterpret_cast<uintptr_t>(raw_) % CXV_VECTOR_BYTES) / sizeof(A);
  }
  ~Scratch() { delete[] raw_; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* take(int64_t count) {
    A* p = next_;
    next_ += count;
    return p;
  }

 private:
  A* raw_;
  A* next_;
};

// f(T{}) with the storage type T of this dtype.
template <class F>
void for_dtype(DType dtype, F&& f) {
  if (dtype == DType::kDouble) return f(double{});
  if (dtype == DType::kFloat) return f(float{});
  if (dtype == DType::kHalf) return f(Half{});
  f(BFloat16{});
}

}  // namespace cxv::CXV_ISA
