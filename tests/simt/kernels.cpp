// csrc/cuda/attention_kernel.cuh on the host, for ctypes (tests/test_cuda_attention.py).
#include "simt.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/attention_kernel.cuh"

namespace {

using namespace cxv;
using namespace cxv::cuda;

// An array that nobody has written.
std::vector<float> unwritten(int64_t count) {
  std::vector<float> array(count);
  std::memset(array.data(), 0xFF, array.size() * sizeof(float));  // NaN
  return array;
}

std::string error;

template <class F>
const char* guarded(F&& f) {
  try {
    f();
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}

// f(Passes) for what is compiled: with a projection one size of float, to keep the compiler's time down.
template <class F>
void for_passes(const LinearAttention& p, F&& f) {
  for_map(p.feature_map, [&](auto map) {
    if (p.dtype == DType::kHalf) return for_size(p, [&](auto size) { f(Passes<__half, size(), map()>()); });
    if (p.dtype == DType::kFloat) {
      if constexpr (kProjected<map()>)
        return f(Passes<float, 16, map()>());
      else
        return for_size(p, [&](auto size) { f(Passes<float, size(), map()>()); });
    }
    throw std::runtime_error("not compiled");
  });
}

// What the caller asks for, on a card of two multiprocessors.
LinearAttention fitted(const LinearAttention& in) {
  LinearAttention p = in;
  fit(p, 2);
  return p;
}

enum class Call { kForward, kBackward, kState, kStateGradients };

}  // namespace

extern "C" {

void simt_arena(const void* begin, int64_t bytes, const uint8_t* allowed) { simt::set_arena(begin, bytes, allowed); }

// The caller fills p but for scratch memory. These return what went wrong, or null.
const char* simt_attention(LinearAttention* in, Call call, unsigned seed) {
  return guarded([&] {
    LinearAttention p = fitted(*in);
    const int64_t heads = p.batch * p.heads;
    auto grad_state = unwritten(heads * p.features * p.value_dim), grad_z = unwritten(heads * p.features);
    if (p.grad_state == nullptr) p.grad_state = grad_state.data(), p.grad_z = grad_z.data();
    for_passes(p, [&](auto passes) {
      Work work;
      const bool backward = call == Call::kBackward;
      const int size = padded_size(p);
      auto scratch = unwritten(carve(p, size, backward, nullptr, &work) + 64);
      carve(p, size, backward, scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) / 4 % 64), &work);
      const auto launch = [&](auto kernel, int64_t blocks, int threads, int bytes, const auto& argument) {
        simt::launch(blocks, threads, bytes, seed, [&] { kernel(p, work, argument); });
      };
      if (call == Call::kForward) passes.forward(p, work, launch);
      if (call == Call::kBackward) passes.backward(p, work, launch);
      if (call == Call::kState) passes.key_state(p, work, launch);
      if (call == Call::kStateGradients) passes.key_gradients(p, work, Role::kState, launch);
    });
  });
}

// The threads and shared memory of each launch of forward and backward, which are not run; how many they are.
int simt_launches(const LinearAttention* in, int* threads, int* shared) {
  LinearAttention p = fitted(*in);
  for (View* grad : {&p.grad_q, &p.grad_k, &p.grad_v}) grad->data = grad;  // all are needed
  int count = 0;
  for_passes(p, [&](auto passes) {
    const auto launch = [&](auto, int64_t, int block, int bytes, const auto&) {
      threads[count] = block;
      shared[count++] = bytes;
    };
    passes.forward(p, Work{}, launch);
    passes.backward(p, Work{}, launch);
  });
  return count;
}

// q is x; out φ, or grad_out its gradient; key_max is that of the keys, or null. Of grad_q null the forward pass.
const char* simt_features(LinearAttention* in, unsigned seed) {
  return guarded([&] {
    LinearAttention p = fitted(*in);
    const Work work = {};
    for_passes(p, [&](auto passes) {
      const auto launch = [&](auto kernel, int64_t blocks, int threads, int bytes, const auto& argument) {
        simt::launch(blocks, threads, bytes, seed, [&] { kernel(p, work, argument); });
      };
      float* const key_max = static_cast<float*>(p.key_max);
      if constexpr (!decltype(passes)::kHasProjection) {
        throw std::runtime_error("no projection");
      } else {
        FeaturesSide side = {p.q, p.out, p.grad_q, key_max, nullptr, p.queries, 0};
        if (p.grad_q.data != nullptr) {
          side.phi = p.grad_out;
          return passes.template phi<Step::kBackward>(p, work, side, launch);
        }
        const int64_t maxima = features_maxima(p);
        auto block_max = unwritten(p.batch * p.heads * maxima);
        side.block_max = block_max.data();
        if (key_max != nullptr && p.feature_map == FeatureMap::kFavor) {
          passes.template phi<Step::kMax>(p, work, side, launch);
          for (int64_t i = 0; i < p.batch * p.heads * maxima; ++i)
            key_max[i / maxima] = i % maxima == 0 ? block_max[i] : std::fmax(key_max[i / maxima], block_max[i]);
        }
        passes.template phi<Step::kForward>(p, work, side, launch);
      }
    });
  });
}
}
