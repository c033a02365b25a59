// What the passes of every op share: one worker's memory, and a case per dtype. Torch-free.
#pragma once

#include "vec.h"
#include "../../core/view.h"

namespace cxv {
namespace CXV_ISA {

template <class T>
T* at(const View& view, int64_t i, int64_t j, int64_t k) {
  return static_cast<T*>(view.data) + i * view.stride[0] + j * view.stride[1] + k * view.stride[2];
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
  switch (dtype) {
    case DType::kDouble:
      return f(double{});
    case DType::kFloat:
      return f(float{});
    case DType::kHalf:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
  }
}

}  // namespace CXV_ISA
}  // namespace cxv
