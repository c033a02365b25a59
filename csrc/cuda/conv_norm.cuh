// The norm pass of conv_norm and its backward on CUDA cores. Torch-free. The derivation is in
// cxv_kernels/ops/conv_norm/README.md; names follow it. A block takes groups of neighboring pixels, its threads laid
// over pixels × lanes of channels: of NCHW a warp runs along 32 pixels, of channels_last along the channels of one,
// which up to 256 it holds in registers (norm_forward_rows, norm_backward_rows).
#pragma once

#include <cmath>

#include "../core/conv_norm.h"
#include "tile.cuh"

namespace cxv::cuda {

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / 32;
// With one or two channels, du is little more than the rounding error of a cancellation. With more channels than the
// maximum, the sums do not fit the shared memory.
constexpr int64_t kMinNormChannels = 3, kMaxNormChannels = 3072;

// What the kernels need beyond ConvNormParams: the convolution's arguments, for the channels whose y does not tell x̂.
struct NormWork {
  View x, weight;  // (B, C_in, H, W), (C, C_in, 3, 3)
  int64_t in_channels, height, width;
  float* mean_weight;  // (C_in · 9 + 1): the mean of weight and bias over C
  int* lost;           // (C + 1): how many channels these are, and which
};

// Rows of threads that have sums of channels of their own.
__host__ __device__ inline int norm_rows(const ConvNormParams& p) {
  if (!p.channels_last) return 1;
  const int64_t fit = (48 * 1024 - 2048) / (12 * p.channels);
  return fit < kNormWarps ? int(fit) : kNormWarps;
}
constexpr int kSumBytes = 4 * kNormThreads;  // of shared memory: Cell::sum's
inline int norm_bytes(const ConvNormParams& p) { return 2048 + int(12 * p.channels) * norm_rows(p); }
__host__ __device__ inline int64_t norm_groups(const ConvNormParams& p) {
  return p.channels_last ? (p.batch * p.pixels + norm_rows(p) - 1) / norm_rows(p) : p.batch * ((p.pixels + 31) / 32);
}

// One thread's pixel and its channels: lane, lane + lanes, …
template <class T>
struct Cell {
  const ConvNormParams& p;
  const bool channels_last;
  const int lane, lanes, slot;             // slot: of the pixel in the group
  int64_t pixel = 0, first = 0, step = 1;  // of all pixels; the element of channel 0; from channel to channel
  bool in_bounds = false;

  __device__ explicit Cell(const ConvNormParams& p)
      : p(p),
        channels_last(p.channels_last),
        lane(channels_last ? threadIdx.x % 32 : threadIdx.x / 32),
        lanes(channels_last ? 32 : kNormWarps),
        slot(channels_last ? threadIdx.x / 32 : threadIdx.x % 32) {}

  __device__ void move_to(int64_t group) {
    if (channels_last) {
      pixel = group * norm_rows(p) + slot;
      in_bounds = slot < norm_rows(p) && pixel < p.batch * p.pixels;
      first = pixel * p.channels;
    } else {
      const int64_t groups = (p.pixels + 31) / 32, image = group / groups, n = group % groups * 32 + slot;
      in_bounds = n < p.pixels;
      pixel = image * p.pixels + n;
      first = image * p.channels * p.pixels + n;
      step = p.pixels;
    }
  }
  // f(channel, element) for this thread's.
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    if (in_bounds)
      for (int64_t c = lane; c < p.channels; c += lanes) f(c, first + c * step);
  }
  // Over the lanes of the pixel. All threads of the block call it.
  __device__ float sum(float x) const {
    if (channels_last) return warp_sum(x);
    float* sums = reinterpret_cast<float*>(shared_memory);
    __syncthreads();
    sums[threadIdx.x] = x;
    __syncthreads();
    x = 0;
#pragma unroll
    for (int i = 0; i < kNormWarps; ++i) x += sums[i * 32 + slot];
    return x;
  }
};

// block = one of any number
template <class T>
__global__ void __launch_bounds__(kNormThreads) norm_forward(const __grid_constant__ ConvNormParams p) {
  Cell<T> cell(p);
  T* y = static_cast<T*>(p.y);
  const T* bias = static_cast<const T*>(p.bias);
  const float *gamma = static_cast<const float*>(p.gamma), *beta = static_cast<const float*>(p.beta);
  const auto value = [&](int64_t c, int64_t i) { return to_float(y[i]) + (bias == nullptr ? 0.f : to_float(bias[c])); };
  for (int64_t group = blockIdx.x; group < norm_groups(p); group += gridDim.x) {
    cell.move_to(group);
    float sum = 0, first = 0, second = 0;
    cell.each([&](int64_t c, int64_t i) { sum += value(c, i); });
    const float shift = cell.sum(sum) / p.channels;
    // Without rounding the first sum would be 0. Its rounding error corrects mean and variance.
    cell.each([&](int64_t c, int64_t i) {
      const float d = value(c, i) - shift;
      first += d;
      second = fmaf(d, d, second);
    });
    const float offset = cell.sum(first) / p.channels;
    const float variance = cell.sum(second) / p.channels - offset * offset;
    const float rstd = 1 / sqrtf((variance < 0 ? 0.f : variance) + float(p.eps));
    cell.each([&](int64_t c, int64_t i) {
      from_float(fmaf((value(c, i) - shift - offset) * rstd, gamma[c], beta[c]), y + i);
    });
    if (cell.in_bounds && cell.lane == 0) static_cast<float*>(p.rstd)[cell.pixel] = rstd;
  }
}

// Does y = γ x̂ + β not tell x̂? One of the README's reasons.
template <class T>
__device__ __forceinline__ bool is_lost(const ConvNormParams& p, int64_t c) {
  const bool low = sizeof(T) == 2, half = p.dtype == DType::kHalf;
  const float smallest = half ? 0x1p-14f : 0x1p-126f, largest = half ? 65504.f : 1.7e38f;
  const float gamma = fabsf(static_cast<const float*>(p.gamma)[c]), beta = fabsf(static_cast<const float*>(p.beta)[c]);
  return p.channels <= 2 ||
         !(gamma >= smallest && beta <= (low ? 4 : 32) * gamma && sqrtf(float(p.channels)) * gamma + beta <= largest);
}

template <class T>
__device__ __forceinline__ float weight_at(const NormWork& work, int64_t c, int64_t in, int tap) {
  const View& w = work.weight;
  return to_float(static_cast<const T*>(
      w.data)[c * w.stride[0] + in * w.stride[1] + tap / 3 * w.stride[2] + tap % 3 * w.stride[3]]);
}

// One block: which channels are lost, and for their sake the mean of weight and bias: it makes the pixels' means.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    norm_find_lost(const __grid_constant__ ConvNormParams p, const __grid_constant__ NormWork work) {
  int* const found = reinterpret_cast<int*>(shared_memory);  // by each warp
  bool any = false;
  for (int64_t c = threadIdx.x; c < p.channels; c += kNormThreads) any |= is_lost<T>(p, c);
  any = __any_sync(~0u, any);
  if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = any;
  __syncthreads();
  any = false;
  for (int i = 0; i < kNormWarps; ++i) any |= found[i] != 0;
  if (threadIdx.x == 0) {
    int count = 0;
    if (any)
      for (int64_t c = 0; c < p.channels; ++c)
        if (is_lost<T>(p, c)) work.lost[1 + count++] = int(c);
    work.lost[0] = count;
  }
  if (!any) return;
  for (int64_t i = threadIdx.x; i <= work.in_channels * 9; i += kNormThreads) {
    float sum = 0;
    for (int64_t c = 0; c < p.channels; ++c)
      sum += i < work.in_channels * 9 ? weight_at<T>(work, c, i / 9, int(i % 9))
             : p.bias == nullptr      ? 0.f
                                      : to_float(static_cast<const T*>(p.bias)[c]);
    work.mean_weight[i] = sum / p.channels;
  }
}

// x̂ of the lost channels into grad_conv: they are convolved again, the pixel's lanes sharing the input's channels.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    norm_find_again(const __grid_constant__ ConvNormParams p, const __grid_constant__ NormWork work) {
  const int lost = work.lost[0];
  if (lost == 0) return;
  const T* bias = static_cast<const T*>(p.bias);
  Cell<T> cell(p);
  for (int64_t group = blockIdx.x; group < norm_groups(p); group += gridDim.x) {
    cell.move_to(group);
    const int row = int(cell.pixel % p.pixels / work.width), column = int(cell.pixel % work.width);
    const T* const x = static_cast<const T*>(work.x.data) + cell.pixel / p.pixels * work.x.stride[0] +
                       row * work.x.stride[2] + column * work.x.stride[3];
    float mean = 0;
    for (int j = -1; j < lost; ++j) {  // first the mean over all channels
      const int64_t c = j < 0 ? 0 : work.lost[1 + j];
      float u = 0;
      for (int64_t in = cell.lane; cell.in_bounds && in < work.in_channels; in += cell.lanes)
        for (int tap = 0; tap < 9; ++tap) {
          const int down = tap / 3 - 1, right = tap % 3 - 1;
          if (row + down < 0 || row + down >= work.height || column + right < 0 || column + right >= work.width)
            continue;
          const T* at = x + in * work.x.stride[1] + down * work.x.stride[2] + right * work.x.stride[3];
          u = fmaf(to_float(*at), j < 0 ? work.mean_weight[in * 9 + tap] : weight_at<T>(work, c, in, tap), u);
        }
      u = cell.sum(u);
      if (j < 0)
        mean = u + work.mean_weight[work.in_channels * 9];
      else if (cell.in_bounds && cell.lane == 0)
        from_float(
            (u + (bias == nullptr ? 0.f : to_float(bias[c])) - mean) * static_cast<const float*>(p.rstd)[cell.pixel],
            static_cast<T*>(p.grad_conv) + cell.first + c * cell.step);
    }
  }
}

// block = split. grad_conv holds x̂ of the lost channels, and gets du where `conv_needed`.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    norm_backward(const __grid_constant__ ConvNormParams p, const __grid_constant__ bool conv_needed) {
  Cell<T> cell(p);
  const T *y = static_cast<const T*>(p.y), *g = static_cast<const T*>(p.grad_out);
  T* du = static_cast<T*>(p.grad_conv);
  const float *gamma = static_cast<const float*>(p.gamma), *beta = static_cast<const float*>(p.beta);
  const int64_t C = p.channels;
  // Σ g x̂, Σ g, Σ du of each channel: in channels_last per warp, else one warp has the channel to itself.
  const int rows = norm_rows(p);
  float* const sums = reinterpret_cast<float*>(shared_memory + 2048);
  for (int64_t i = threadIdx.x; i < 3 * C * rows; i += kNormThreads) sums[i] = 0;
  __syncthreads();
  float* const own = sums + (p.channels_last && cell.slot < rows ? cell.slot * 3 * C : 0);
  const auto add = [&](int64_t i, float x) {
    if (!p.channels_last) {
      x = warp_sum(x);
      if (cell.slot == 0) own[i] += x;
    } else {
      own[i] += x;
    }
  };
  const auto xhat = [&](int64_t c, int64_t i) {
    return is_lost<T>(p, c) ? to_float(du[i]) : (to_float(y[i]) - beta[c]) / gamma[c];
  };
  // As cell.each, but in NCHW with all 32 pixels, for add's sake.
  const auto each = [&](auto&& f) {
    if (p.channels_last && !cell.in_bounds) return;
    for (int64_t c = cell.lane; c < C; c += cell.lanes) f(c, cell.first + c * cell.step);
  };
  const int64_t groups = norm_groups(p), per_split = (groups + gridDim.x - 1) / gridDim.x;
  for (int64_t group = blockIdx.x * per_split; group < groups && group < (blockIdx.x + 1) * per_split; ++group) {
    cell.move_to(group);
    float sum_a = 0, sum_ax = 0;
    each([&](int64_t c, int64_t i) {
      const float dy = cell.in_bounds ? to_float(g[i]) : 0.f, x = cell.in_bounds ? xhat(c, i) : 0.f;
      sum_a = fmaf(dy, gamma[c], sum_a);
      sum_ax = fmaf(dy * gamma[c], x, sum_ax);
      add(c, dy * x);
      add(C + c, dy);
    });
    const float mean_a = cell.sum(sum_a) / C, mean_ax = cell.sum(sum_ax) / C;
    if (!conv_needed && p.grad_bias == nullptr) continue;
    const float rstd = cell.in_bounds ? static_cast<const float*>(p.rstd)[cell.pixel] : 0.f;
    each([&](int64_t c, int64_t i) {
      float d = 0;
      if (cell.in_bounds) d = rstd * (to_float(g[i]) * gamma[c] - mean_a - xhat(c, i) * mean_ax);
      if (cell.in_bounds && conv_needed) from_float(d, du + i);
      add(2 * C + c, d);
    });
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < 3 * C; i += kNormThreads) {
    float total = 0;
    for (int row = 0; row < rows; ++row) total += sums[row * 3 * C + i];
    static_cast<float*>(p.partial)[blockIdx.x * 3 * C + i] = total;
  }
}

// channels_last, up to 256 channels: a warp has a pixel, each lane four or eight of its channels in registers.

// Channels (j · 32 + lane) · 4 + i, i < 4, of a row of J · 128 at most.
template <class T, int J>
struct Row {
  static constexpr int kCount = 4 * J;
  struct __align__(4 * sizeof(T)) Four {
    Pair<T> pair[2];
  };

  const int64_t channels;
  const int lane = threadIdx.x % 32;

  __device__ int channel(int i) const { return (i / 4 * 32 + lane) * 4 + i % 4; }
  __device__ bool has(int i) const { return channel(i) < channels; }
  // 0 beyond the channels.
  __device__ __forceinline__ void load(float (&v)[kCount], const T* x) const {
#pragma unroll
    for (int j = 0; j < J; ++j) {
      Four four = {};
      if (has(4 * j)) four = *reinterpret_cast<const Four*>(x + channel(4 * j));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 two = unpack(four.pair[i]);
        v[4 * j + 2 * i] = two.x;
        v[4 * j + 2 * i + 1] = two.y;
      }
    }
  }
  __device__ __forceinline__ void store(T* x, const float (&v)[kCount]) const {
#pragma unroll
    for (int j = 0; j < J; ++j) {
      const Four four = {pack<T>(v[4 * j], v[4 * j + 1]), pack<T>(v[4 * j + 2], v[4 * j + 3])};
      if (has(4 * j)) *reinterpret_cast<Four*>(x + channel(4 * j)) = four;
    }
  }
  // A vector over the channels, `other` beyond and where there is none.
  template <class V>
  __device__ __forceinline__ void vector(float (&v)[kCount], const V* x, float other) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = x != nullptr && has(i) ? to_float(x[channel(i)]) : other;
  }
};

template <class T>
bool in_rows(const ConvNormParams& p) {
  const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % (4 * sizeof(T)) == 0; };
  return p.channels_last && p.channels % 4 == 0 && p.channels <= 256 && aligned(p.y) && aligned(p.grad_out) &&
         aligned(p.grad_conv);
}

// block = one of any number
template <class T, int J>
__global__ void __launch_bounds__(kNormThreads) norm_forward_rows(const __grid_constant__ ConvNormParams p) {
  const Row<T, J> row{p.channels};
  constexpr int N = row.kCount;
  float v[N], bias[N], gamma[N], beta[N];
  row.vector(bias, static_cast<const T*>(p.bias), 0);
  row.vector(gamma, static_cast<const float*>(p.gamma), 0);
  row.vector(beta, static_cast<const float*>(p.beta), 0);
  const float share = 1 / float(p.channels);
  const int64_t pixels = p.batch * p.pixels;
  for (int64_t n = int64_t(blockIdx.x) * kNormWarps + threadIdx.x / 32; n < pixels; n += gridDim.x * kNormWarps) {
    T* const y = static_cast<T*>(p.y) + n * p.channels;
    row.load(v, y);
    float sum = 0, first = 0, second = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) sum += v[i] += bias[i];
    const float shift = warp_sum(sum) * share;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[i] = row.has(i) ? v[i] - shift : 0.f;
      first += v[i];
      second = fmaf(v[i], v[i], second);
    }
    const float offset = warp_sum(first) * share, variance = warp_sum(second) * share - offset * offset;
    const float rstd = 1 / sqrtf((variance < 0 ? 0.f : variance) + float(p.eps));
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = fmaf((v[i] - offset) * rstd, gamma[i], beta[i]);
    row.store(y, v);
    if (row.lane == 0) static_cast<float*>(p.rstd)[n] = rstd;
  }
}

// As norm_backward.
template <class T, int J>
__global__ void __launch_bounds__(kNormThreads)
    norm_backward_rows(const __grid_constant__ ConvNormParams p, const __grid_constant__ bool conv_needed) {
  const Row<T, J> row{p.channels};
  constexpr int N = row.kCount;
  float gamma[N], beta[N], inverse[N], sums[3][N] = {};  // inverse: 1/γ, 0 where y does not tell x̂
  row.vector(gamma, static_cast<const float*>(p.gamma), 0);
  row.vector(beta, static_cast<const float*>(p.beta), 0);
  bool lost = false;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool tells = row.has(i) && !is_lost<T>(p, row.channel(i));
    inverse[i] = tells ? 1 / gamma[i] : 0.f;
    lost |= row.has(i) && !tells;
  }
  lost = __any_sync(~0u, lost);
  const float share = 1 / float(p.channels);
  const int warp = threadIdx.x / 32;
  const int64_t pixels = p.batch * p.pixels, groups = norm_groups(p), per_split = (groups + gridDim.x - 1) / gridDim.x;
  const int64_t end =
      (blockIdx.x + 1) * per_split * kNormWarps < pixels ? (blockIdx.x + 1) * per_split * kNormWarps : pixels;
  for (int64_t n = blockIdx.x * per_split * kNormWarps + warp; n < end; n += kNormWarps) {
    T* const du = static_cast<T*>(p.grad_conv) + n * p.channels;
    float g[N], x[N], again[N], sum_a = 0, sum_ax = 0;
    row.load(g, static_cast<const T*>(p.grad_out) + n * p.channels);
    row.load(x, static_cast<const T*>(p.y) + n * p.channels);
    if (lost) row.load(again, du);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = lost && inverse[i] == 0 ? again[i] : (x[i] - beta[i]) * inverse[i];
      sums[0][i] = fmaf(g[i], x[i], sums[0][i]);
      sums[1][i] += g[i];
      g[i] *= gamma[i];
      sum_a += g[i];
      sum_ax = fmaf(g[i], x[i], sum_ax);
    }
    if (!conv_needed && p.grad_bias == nullptr) continue;
    const float mean_a = warp_sum(sum_a) * share, mean_ax = warp_sum(sum_ax) * share;
    const float rstd = static_cast<const float*>(p.rstd)[n];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = rstd * (g[i] - mean_a - x[i] * mean_ax);
      sums[2][i] += x[i];
    }
    if (conv_needed) row.store(du, x);
  }

  float* const all = reinterpret_cast<float*>(shared_memory);  // (warps, 3, C)
#pragma unroll
  for (int i = 0; i < 3 * N; ++i)
    if (row.has(i % N)) all[(warp * 3 + i / N) * p.channels + row.channel(i % N)] = sums[i / N][i % N];
  __syncthreads();
  for (int64_t i = threadIdx.x; i < 3 * p.channels; i += kNormThreads) {
    float total = 0;
#pragma unroll
    for (int of = 0; of < kNormWarps; ++of) total += all[of * 3 * p.channels + i];
    static_cast<float*>(p.partial)[blockIdx.x * 3 * p.channels + i] = total;
  }
}

// A warp for a channel.
template <class T>
__global__ void __launch_bounds__(kNormThreads) norm_backward_reduce(const __grid_constant__ ConvNormParams p) {
  const int64_t c = int64_t(blockIdx.x) * kNormWarps + threadIdx.x / 32;
  if (c >= p.channels) return;
  float sums[3] = {0, 0, 0};
#pragma unroll 4
  for (int64_t s = threadIdx.x % 32; s < p.splits; s += 32)
#pragma unroll
    for (int k = 0; k < 3; ++k) sums[k] += static_cast<const float*>(p.partial)[(s * 3 + k) * p.channels + c];
#pragma unroll
  for (int k = 0; k < 3; ++k) sums[k] = warp_sum(sums[k]);
  if (threadIdx.x % 32 != 0) return;
  if (p.grad_gamma != nullptr) static_cast<float*>(p.grad_gamma)[c] = sums[0];
  if (p.grad_beta != nullptr) static_cast<float*>(p.grad_beta)[c] = sums[1];
  if (p.grad_bias != nullptr) from_float(sums[2], static_cast<T*>(p.grad_bias) + c);
}

// Splits of the sums over pixels. They depend only on the shape.
inline int64_t norm_splits(const ConvNormParams& p) {
  const int64_t splits = (norm_groups(p) + 3) / 4;
  return splits < 1 ? 1 : splits < 512 ? splits : 512;
}

// launch(kernel, blocks, threads, bytes of shared memory, arguments…) in order.
template <class T, class Launch>
void norm_forward_pass(const ConvNormParams& p, Launch&& launch) {
  const int64_t groups = norm_groups(p), few = (groups + 3) / 4;  // whose threads read γ and β once
  if (in_rows<T>(p))
    launch(p.channels <= 128 ? norm_forward_rows<T, 1> : norm_forward_rows<T, 2>, few < 65535 ? few : 65535,
           kNormThreads, 0, p);
  else
    launch(norm_forward<T>, groups < 65535 ? groups : 65535, kNormThreads, kSumBytes, p);
}
template <class T, class Launch>
void norm_backward_pass(const ConvNormParams& p, const NormWork& work, bool conv_needed, Launch&& launch) {
  const int64_t groups = norm_groups(p);
  launch(norm_find_lost<T>, 1, kNormThreads, kSumBytes, p, work);
  launch(norm_find_again<T>, groups < 2048 ? groups : 2048, kNormThreads, kSumBytes, p,
         work);  // few: nearly always for nothing
  const auto rows = p.channels <= 128 ? norm_backward_rows<T, 1> : norm_backward_rows<T, 2>;
  launch(in_rows<T>(p) ? rows : norm_backward<T>, p.splits, kNormThreads, norm_bytes(p), p, conv_needed);
  launch(norm_backward_reduce<T>, (p.channels + kNormWarps - 1) / kNormWarps, kNormThreads, 0, p);
}

}  // namespace cxv::cuda
