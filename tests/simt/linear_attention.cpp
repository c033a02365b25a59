// csrc/cuda's linear-attention kernels on the host, for ctypes (tests/test_cuda_source.py).
#include "simt.h"

#include "../../csrc/cuda/linear_attention_kernel.cuh"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

namespace {

// An array of accumulators that nobody has written.
std::vector<double> unwritten(int64_t count) {
  std::vector<double> array(count + 1);
  std::memset(array.data(), 0xFF, array.size() * sizeof(double));  // NaN in float, too
  return array;
}

std::string error;

}  // namespace

extern "C" {

void simt_arena(const void* begin, int64_t bytes, const uint8_t* allowed) { simt::set_arena(begin, bytes, allowed); }

// threads 0: the plan's. The caller fills p but for splits and scratch memory. Returns what went wrong, or null.
const char* simt_linear_attention(cxv::LinearAttention* in, bool forward, int threads, unsigned seed) {
  cxv::LinearAttention p = *in;
  auto plan = cxv::cuda::make_plan(p, cxv::cuda::accumulator_bytes(p));
  if (threads > 0) plan.threads = threads;
  cxv::cuda::set_splits(p, plan, forward);
  const int64_t heads = p.batch * p.heads, matrix = p.dim * p.value_dim;
  auto partial =
      unwritten(forward ? heads * p.key_splits * (2 * p.dim + matrix) : heads * p.query_splits * (p.dim + matrix));
  auto grad_state = unwritten(heads * matrix), grad_z = unwritten(heads * p.dim);
  p.partial = partial.data();
  p.grad_state = grad_state.data();
  p.grad_z = grad_z.data();
  const auto launch = [&](auto kernel, int64_t blocks, int threads, int bytes) {
    simt::launch(blocks, threads, bytes, seed, [&] { kernel(p, plan); });
  };
  try {
    cxv::cuda::for_dtype(p.dtype, [&](auto x) {
      if (forward)
        cxv::cuda::forward<decltype(x)>(p, plan, launch);
      else
        cxv::cuda::backward<decltype(x)>(p, plan, launch);
    });
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}

// The largest shared memory of any launch, and whether the threads' registers hold the state.
int simt_linear_attention_plan(int dim, int value_dim, int accumulator_bytes, int* fits) {
  cxv::LinearAttention p = {};
  p.dim = dim;
  p.value_dim = value_dim;
  const auto plan = cxv::cuda::make_plan(p, accumulator_bytes);
  *fits = plan.threads <= cxv::cuda::kMaxThreads && plan.tile % 4 == 0 && plan.chunk % 4 == 0 && plan.tile > 0 &&
          plan.chunk > 0 && plan.threads * cxv::cuda::kRegisterTiles >= plan.dim / 4 * (plan.value_dim / 4);
  return std::max({plan.tile_count(), plan.state_count(), plan.backward_count()}) * accumulator_bytes;
}

int simt_linear_attention_max_dim() { return int(cxv::cuda::kMaxDim); }
}
