// csrc/cuda/conv_norm.cuh on the host, for ctypes (test_cuda_conv_norm.py).
#include "cuda/conv_norm.cuh"

#include <vector>

#include "cuda/device.cuh"

using namespace cxv;
using namespace cxv::cuda;

extern "C" {

const char* simt_norm_forward(const ConvNormParams* p, unsigned seed) {
  simt::launch_seed = seed;
  return simt::guarded([&] { for_dtype(p->dtype, [&](auto t) { norm_forward_pass<decltype(t)>(*p, Launch{}); }); });
}

const char* simt_norm_backward(ConvNormParams* p, const View* x, const View* weight, int64_t in_channels,
                               int64_t height, int64_t width, bool conv_needed, unsigned seed) {
  simt::launch_seed = seed;
  return simt::guarded([&] {
    p->splits = norm_splits(*p);
    std::vector<float> partial(p->splits * 3 * p->channels, NAN), mean_weight(in_channels * 9 + 1, NAN);
    std::vector<int> lost(p->channels + 1, -1);
    p->partial = partial.data();
    const NormWork work = {*x, *weight, in_channels, height, width, mean_weight.data(), lost.data()};
    for_dtype(p->dtype, [&](auto t) { norm_backward_pass<decltype(t)>(*p, work, conv_needed, Launch{}); });
  });
}
}
