// What the ops' host code shares: tensors of the stable ABI as the plain structs of csrc/core, and new tensors.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "view.h"

extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();  // from PyTorch 2.13 on

namespace cxv {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* name = "q") {
  if (t.scalar_type() == ScalarType::Double) return DType::kDouble;
  if (t.scalar_type() == ScalarType::Float) return DType::kFloat;
  if (t.scalar_type() == ScalarType::Half) return DType::kHalf;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16, "cxv_kernels: ", name,
                  " must be float64, float32, float16 or bfloat16");
  return DType::kBFloat16;
}

// The dtype of state and statistics.
inline ScalarType accumulator_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// `like` is called like_name in messages.
inline void check(const char* name, const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape,
                  ScalarType dtype, const char* like_name = "q") {
  STD_TORCH_CHECK(t.dim() == int64_t(shape.size()), "cxv_kernels: ", name, " must have ", shape.size(),
                  " dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == dtype, "cxv_kernels: ", name, " has a dtype that does not go with ", like_name,
                  "'s");
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(),
                  "cxv_kernels: ", name, " must be on ", like_name, "'s device");
  int64_t d = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(t.size(d) == size, "cxv_kernels: ", name, " has size ", t.size(d), " in dimension ", d,
                    ", expected ", size);
    ++d;
  }
}

// The elements of a tensor in the dtype of state, which becomes contiguous.
inline void* checked_data(const char* name, Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape,
                          const char* like_name = "q") {
  check(name, t, like, shape, accumulator_of(like), like_name);
  t = torch::stable::contiguous(t);
  return t.data_ptr();
}

// Makes a GPU's device the current one.
struct OnDevice {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  explicit OnDevice(const Tensor& t) {
    if (t.is_cuda()) guard.emplace(t.get_device_index());
  }
};

inline View view(const Tensor& t) {
  View v;
  v.data = t.data_ptr();
  for (int i = 0; i < 4; ++i) v.stride[i] = t.stride(i);
  return v;
}

// The results of an op of PyTorch. An error has PyTorch's message if the stable ABI provides it.
template <size_t results = 1, class... Arguments>
std::array<Tensor, results> call(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, std::max(sizeof...(Arguments), results)> stack = {torch::stable::detail::from(arguments)...};
  if (torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS) {
    const bool kept = torch_exception_get_what_without_backtrace != nullptr;
    const char* why = kept ? torch_exception_get_what_without_backtrace() : nullptr;
    STD_TORCH_CHECK(false, "cxv_kernels: ", op, " has failed: ",
                    why != nullptr ? why : "perhaps out of memory (PyTorch before 2.13 prints the reason, no more)");
  }
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return std::array<Tensor, results>{torch::stable::detail::to<Tensor>(stack[i])...};
  }(std::make_index_sequence<results>{});
}

// A tensor of this shape whose dimensions lie in memory in the order of like's; like_layout in cxv_kernels does the
// same.
inline Tensor new_like(const Tensor& like, std::array<int64_t, 4> shape) {
  std::array<int64_t, 4> order = {0, 1, 2, 3}, strides;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return like.stride(a) > like.stride(b); });
  int64_t step = 1;
  for (int i = 3; i >= 0; --i) {
    strides[order[i]] = step;
    step *= std::max<int64_t>(shape[order[i]], 1);
  }
  // Through the dispatcher, so that PyTorch's fill of uninitialized memory in deterministic mode reaches it.
  return call("aten::new_empty_strided", like, IntHeaderOnlyArrayRef(shape), IntHeaderOnlyArrayRef(strides),
              std::nullopt, std::nullopt, std::nullopt, std::nullopt)[0];
}

inline void check_needed(const std::vector<bool>& needed, size_t count) {
  STD_TORCH_CHECK(needed.size() == count, "cxv_kernels: needed must have ", count, " elements, got ", needed.size());
}

// Tuple of gradients of four dimensions. One that is not needed has no elements, and its view no data.
struct GradientOf {
  const Tensor& like;
  View* view;
};
template <size_t n>
auto new_gradients(const std::vector<bool>& needed, const GradientOf (&gradients)[n]) {
  check_needed(needed, n);
  const auto make = [](const Tensor& like, bool is_needed, View* out) {
    if (!is_needed) return torch::stable::new_empty(like, {0});
    Tensor grad = new_like(like, {like.size(0), like.size(1), like.size(2), like.size(3)});
    *out = view(grad);
    return grad;
  };
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return std::tuple{make(gradients[i].like, needed[i], gradients[i].view)...};
  }(std::make_index_sequence<n>{});
}

inline Tensor new_accumulator(const Tensor& like, std::initializer_list<int64_t> shape) {
  return call("aten::new_empty", like, IntHeaderOnlyArrayRef(shape), std::optional(accumulator_of(like)), std::nullopt,
              std::nullopt, std::nullopt)[0];
}

}  // namespace cxv
