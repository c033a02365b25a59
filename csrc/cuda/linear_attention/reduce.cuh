// Add the sums of the splits in order (reduce), and convert them for the passes over tokens (pack_state).
#pragma once

#include "key_pass.cuh"

namespace cxv::cuda {

constexpr int kReduceWarps = 4, kReduceFeatures = 16;  // of a block: a warp has a feature at a time, its lanes channels
constexpr int kMaxWidth = 64;                          // of D and E

// block = head · blocks of features + block of features
template <FeatureMap map, bool queries>
__global__ void __launch_bounds__(32 * kReduceWarps)
    reduce(const __grid_constant__ Work p, const __grid_constant__ SumsSide side) {
  using Relative = cuda::Relative<kExponential<map>>;
  constexpr int kChannels = kMaxWidth / 32;  // of a lane
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int M = int(p.features), E = int(p.value_dim), splits = int(side.splits), width = E + 3;
  const int blocks = (M + kReduceFeatures - 1) / kReduceFeatures, first = int(blockIdx.x % blocks) * kReduceFeatures;
  const int64_t head = blockIdx.x / blocks, size = int64_t(M + 1) * width;
  const float* partial = p.partial + head * splits * size;
  const auto record = [&](int split, int m) { return partial + split * size + m * width; };
  const float c = constant_of<map>(p);

  // FAVOR+ with eps has one maximum for all features of a head: that of z.
  float key_max = 0;
  if (map == FeatureMap::kFavor && !normalized<map>(p)) {
    if (queries) {
      key_max = static_cast<const float*>(p.key_max)[head] * kLog2e;
    } else {
      key_max = -INFINITY;
      for (int s = 0; s < splits; ++s)
        for (int m = threadIdx.x; m < M; m += 32 * kReduceWarps) key_max = fmaxf(key_max, record(s, m)[2]);
      float* maxima = reinterpret_cast<float*>(shared_memory);
      key_max = warp_max(key_max);
      if (lane == 0) maxima[warp] = key_max;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kReduceWarps; ++i) key_max = fmaxf(key_max, maxima[i]);
      if (key_max == -INFINITY) key_max = 0;  // no key is seen
    }
  }
  if (!queries && first == 0 && threadIdx.x == 0 && p.key_max != nullptr)
    static_cast<float*>(p.key_max)[head] = key_max * kLn2;

  float plain[kChannels] = {}, plain_omega = 0;  // Σ ι y, Σ ιω
  if (c != 0)
    for (int s = 0; s < splits; ++s) {
      const float* of = record(s, M);
      plain_omega += of[1];
#pragma unroll
      for (int i = 0; i < kChannels; ++i)
        if (lane + 32 * i < E) plain[i] += of[3 + lane + 32 * i];
    }

  float total = 0;  // Σ z
  if (queries && kExponential<map> && c != 0) {
    for (int m = lane; m < M; m += 32) total += static_cast<const float*>(p.key_stat)[head * M + m];
    total = warp_sum(total);
  }
  const float rescaled = queries ? rescaling<map>(p, static_cast<const float*>(p.key_stat) + head * M, M) : 1.f;
#pragma unroll
  for (int k = 0; k < kReduceFeatures / kReduceWarps; ++k) {
    const int m = first + k * kReduceWarps + warp;
    if (m >= M) break;
    const int64_t at = head * M + m;
    float running_max = Relative::kNone, weighed = 0, sum[kChannels] = {};
    for (int s = 0; s < splits; ++s) running_max = fmaxf(running_max, record(s, m)[0]);
    for (int s = 0; s < splits; ++s) {
      const float* of = record(s, m);
      const float weight = Relative::factor(of[0], running_max);
      weighed = fmaf(weight, of[1], weighed);
#pragma unroll
      for (int i = 0; i < kChannels; ++i)
        if (lane + 32 * i < E) sum[i] = fmaf(weight, of[3 + lane + 32 * i], sum[i]);
    }

    const float stat = queries ? static_cast<const float*>(p.key_stat)[at] * rescaled : 0.f;
    // e of the feature is `unit` times what it is relative to `running_max`; φ is c more.
    float unit = kExponential<map> ? ptx::exp2(Relative::base(running_max) - key_max) : running_max, plain_unit = c;
    if (normalized<map>(p)) unit = weighed > 0 ? 1 / weighed : 0.f;
    if (queries) {
      if (map == FeatureMap::kSoftmax)
        unit = ptx::exp2(Relative::base(running_max));
      else if (normalized<map>(p))
        unit = stat == INFINITY ? 0.f : ptx::exp2(Relative::base(running_max) + stat * kLog2e);
      else
        unit = stat == 0           ? 0.f
               : kExponential<map> ? ptx::exp2(Relative::base(running_max) + log2f(stat))
                                   : running_max * stat;
      plain_unit = c == 0 ? 0.f : !kExponential<map> ? c * stat : total > 0 ? stat / total : 0.f;
    }
    float* const matrix = static_cast<float*>(queries ? p.grad_state : p.state) + at * E;
#pragma unroll
    for (int i = 0; i < kChannels; ++i)
      if (lane + 32 * i < E) matrix[lane + 32 * i] = fmaf(unit, sum[i], plain_unit * plain[i]);
    if (lane == 0)
      static_cast<float*>(queries ? p.grad_z : p.key_stat)[at] =
          queries || !normalized<map>(p)      ? fmaf(unit, weighed, plain_unit * plain_omega)
          : weighed > 0 || weighed != weighed ? (running_max + log2f(weighed)) * kLn2
                                              : INFINITY;  // no key is seen
  }
}

// Which quantity is packed: U for the query pass, R for the key backward, the gradient of S itself for kv_state.
enum class PackFor { kQueries, kKeys, kState };
struct PackSide {
  PackFor role;
  // Of N keys a weight e/z is at most 1, and about 1/N: 16 bits hold both ends when it is multiplied by 2^raise.
  int raise;
};

template <int P>
struct PackShape {
  static constexpr int kThreads = 256, kLanes = P < 32 ? P : 32, kChannels = P / kLanes;  // a feature's lanes
  static constexpr int kRows = kThreads / kLanes;                                         // features at a time
  static constexpr int kBytes = (2 * P + 2 * kRows * P + kRows + kThreads / 32) * 4;
};

// block = head
template <class T, int P, FeatureMap map>
__global__ void __launch_bounds__(PackShape<P>::kThreads, 1)
    pack_state(const __grid_constant__ Work p, const __grid_constant__ PackSide side) {
  using Shape = PackShape<P>;
  constexpr int Lanes = Shape::kLanes, Channels = Shape::kChannels, Rows = Shape::kRows;
  const PackFor role = side.role;
  const int64_t head = blockIdx.x;
  const int M = int(p.features), E = int(p.value_dim), padded = round_up_16(M);
  const int row = threadIdx.x / Lanes, lane = threadIdx.x % Lanes;
  const bool log = normalized<map>(p), keys = role != PackFor::kQueries;
  const float c = constant_of<map>(p);
  const float* state = static_cast<const float*>(p.state) + head * M * E;  // kState: unused
  const float* stat = static_cast<const float*>(p.key_stat) + head * M;
  const float* R = static_cast<const float*>(p.grad_state) + head * M * E;
  const float* rho = static_cast<const float*>(p.grad_z) + head * M;
  float* vector = p.vector + head * (P + 3);
  float *center = reinterpret_cast<float*>(shared_memory), *extra = center + P, *sums = extra + P;
  float *sums_of_keys = sums + Rows * P, *totals = sums_of_keys + Rows * P, *maxima = totals + Rows;

  const float rescaled = role == PackFor::kQueries ? rescaling<map>(p, stat, M) : 1.f;
  // c̄, and c Σ R/z
  float total = 0;
  if (role != PackFor::kState) {
    float sum[Channels] = {}, of_keys[Channels] = {};
    for (int m = row; m < M; m += Rows) {
      const float z = log ? 1.f : stat[m];
      total += z;
#pragma unroll
      for (int i = 0; i < Channels; ++i) {
        const int e = lane + i * Lanes;
        if (e >= E) continue;
        sum[i] += state[m * E + e];
        if (keys && c != 0 && z != 0) of_keys[i] += R[m * E + e] / z;
      }
    }
#pragma unroll
    for (int i = 0; i < Channels; ++i) {
      sums[row * P + lane + i * Lanes] = sum[i];
      sums_of_keys[row * P + lane + i * Lanes] = of_keys[i];
    }
    if (lane == 0) totals[row] = total;
    __syncthreads();
    if (threadIdx.x < P) {
      float sum = 0, of_keys = 0;
      total = 0;
#pragma unroll
      for (int i = 0; i < Rows; ++i) {
        sum += sums[i * P + threadIdx.x];
        of_keys += sums_of_keys[i * P + threadIdx.x];
        total += totals[i];
      }
      center[threadIdx.x] = total != 0 ? sum / total : 0.f;
      extra[threadIdx.x] = c * of_keys;
    }
    __syncthreads();
  }

  const auto element = [&](int m, int e) {
    if (m >= M || e >= E) return 0.f;
    if (keys) return R[m * E + e];
    if (log) return stat[m] == INFINITY && map != FeatureMap::kSoftmax ? 0.f : state[m * E + e] - center[e];
    return stat[m] == 0 ? 0.f : state[m * E + e] / stat[m] - center[e];
  };
  float largest = 0;
  for (int m = row; m < M; m += Rows)
#pragma unroll
    for (int i = 0; i < Channels; ++i) largest = fmaxf(largest, fabsf(element(m, lane + i * Lanes)));
  largest = warp_max(largest);
  if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Shape::kThreads / 32; ++i) largest = fmaxf(largest, maxima[i]);
  // Subnormal numbers count as 0: their scale has no finite reciprocal.
  const float scale = largest >= 0x1p-126f && largest < INFINITY ? exp2f(ceilf(log2f(largest))) : 1.f;
  const float inverse = 1 / scale;

  T* rows = static_cast<T*>(p.rows) + head * padded * P;
  const float none = kExponential<map> ? -INFINITY : 0.f;
  for (int m = row; m < padded; m += Rows) {
    float along = 0;  // of R as rounded with c̄; the softmax pair's weights do not know z, so there ρ = −R·U
#pragma unroll
    for (int i = 0; i < Channels; ++i) {
      const int e = lane + i * Lanes;
      T* to = &rows[m * P + e];
      from_float(element(m, e) * inverse, to);
      if (keys && role != PackFor::kState && m < M && e < E)
        along = fmaf(to_float(*to), map == FeatureMap::kSoftmax ? state[m * E + e] : center[e], along);
    }
#pragma unroll
    for (int lanes = Lanes / 2; lanes > 0; lanes /= 2) along += __shfl_xor_sync(~0u, along, lanes);
    if (lane != 0) continue;
    float weight = none, offset = 0;
    if (m < M) {
      if (!keys)
        weight = map == FeatureMap::kSoftmax ? 0.f
                 : log                       ? (stat[m] == INFINITY ? none : stat[m] * kLog2e)
                 : kExponential<map>         ? (stat[m] == 0 ? none : log2f(stat[m]))
                                             : stat[m] * rescaled;
      else if (log)
        weight = float(side.raise) - stat[m] * kLog2e;
      else if (role == PackFor::kState)
        weight = 1;
      else if (kExponential<map>)
        weight = stat[m] == 0
                     ? none
                     : float(side.raise) - log2f(stat[m]) - static_cast<const float*>(p.key_max)[head] * kLog2e;
      else
        weight = stat[m] == 0 ? 0.f : float(1 << side.raise) / stat[m];
      if (keys) offset = (map != FeatureMap::kSoftmax || role == PackFor::kState ? rho[m] * inverse : 0.f) - along;
    }
    p.weight[head * padded + m] = weight;
    p.offset[head * padded + m] = offset;
  }
  if (threadIdx.x < P)
    vector[threadIdx.x] = role == PackFor::kState ? 0.f : keys ? extra[threadIdx.x] : center[threadIdx.x];
  if (threadIdx.x == 0) {
    vector[P] = scale;
    // Of exponential maps the logarithm: of a small c the product underflows.
    vector[P + 1] = !kExponential<map>   ? c * total * rescaled
                    : c > 0 && total > 0 ? log2f(c) + log2f(total)
                                         : -INFINITY;
    vector[P + 2] = rescaled;
  }
}

}  // namespace cxv::cuda
