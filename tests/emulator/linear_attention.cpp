// csrc/cuda/linear_attention on the host, for ctypes (test_cuda_attention.py).
#include <cstring>
#include <vector>

#include "cuda/device.cuh"

namespace {

using namespace cxv;
using namespace cxv::cuda;

constexpr int64_t kResidentBlocks = 2;

// An array that nobody has written.
std::vector<float> unwritten(int64_t count) {
  std::vector<float> array(count);
  std::memset(array.data(), 0xFF, array.size() * sizeof(float));  // NaN
  return array;
}

void run_passes(Call call, const Work& p) {
  for_dtype(p.dtype, [&](auto t) { cuda::run<decltype(t)>(call, p, Launch{}); });
}

}  // namespace

extern "C" {

// The caller fills p but for splits and scratch memory. These return what went wrong, or null.
const char* simt_attention(const LinearAttentionParams* in, Call call, unsigned seed) {
  simt::launch_seed = seed;
  return simt::guarded([&] {
    Work p = {*in};
    set_splits(p);
    const int64_t heads = p.batch * p.heads;
    auto grad_state = unwritten(heads * p.features * p.value_dim), grad_z = unwritten(heads * p.features);
    if (p.grad_state == nullptr) p.grad_state = grad_state.data(), p.grad_z = grad_z.data();
    p.resident_blocks = kResidentBlocks;
    auto scratch = unwritten(plan_workspace(p, call, nullptr) + 64);
    plan_workspace(p, call, scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) / 4 % 64));
    const int64_t maxima = feature_maxima(p, kResidentBlocks);
    auto feature_max = unwritten(call == Call::kFeaturesMax ? heads * maxima : 0);
    p.feature_max = feature_max.data();
    run_passes(call, p);
    float* const key_max = static_cast<float*>(p.key_max);
    for (int64_t i = 0; i < int64_t(feature_max.size()); ++i)
      key_max[i / maxima] = i % maxima == 0 ? feature_max[i] : std::fmax(key_max[i / maxima], feature_max[i]);
  });
}

// The threads and shared memory of each launch of forward and backward, which are not run; how many they are.
int simt_launches(const LinearAttentionParams* in, int* threads, int* shared) {
  Work p = {*in};
  set_splits(p);
  p.resident_blocks = kResidentBlocks;
  for (View* grad : {&p.grad_q, &p.grad_k, &p.grad_v}) grad->data = grad;  // all are needed
  int count = 0;
  simt::launch_observer = [&](int block, int bytes) {
    threads[count] = block;
    shared[count++] = bytes;
  };
  for (Call call : {Call::kForward, Call::kBackward}) run_passes(call, p);
  simt::launch_observer = nullptr;
  return count;
}
}
