// Linear attention on CUDA cores. A block serves a run of tokens of one head: tiles of tokens lie in shared memory,
// the D×E state it sums lies in its threads' registers. The derivation is in cxv_kernels/linear_attention/README.md;
// passes, names and partial sums are those of csrc/cpu/linear_attention_kernel.h, with one simplification: the
// softmax over D is the feature map exp(x − max) with z = 1. Torch-free, no warp collectives, right for any number of
// threads whose registers hold the state; the tests run it on the host.
#pragma once

#include <cmath>
#include <cstdint>

#include "../include/linear_attention.h"
#include "number.cuh"

namespace cxv {
namespace cuda {

constexpr int64_t kMaxDim = 128;         // of D and of E
constexpr int kMaxThreads = 256;         // of a block
constexpr int kRegisterTiles = 4;        // 4×4 tiles of the state in a thread's registers: 256 threads hold 128×128
constexpr int kSharedBytes = 48 * 1024;  // what every device grants without asking

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

// f(T{}) for the storage type T of a dtype.
template <class F>
void for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kDouble:
      return f(double{});
    case DType::kFloat:
      return f(float{});
    case DType::kHalf:
      return f(__half{});
    case DType::kBFloat16:
      return f(__nv_bfloat16{});
  }
}

inline int accumulator_bytes(const LinearAttention& p) { return p.dtype == DType::kDouble ? 8 : 4; }

__host__ __device__ inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// How a block works. It follows from D, E and the accumulator alone, so that no sum's order depends on anything else.
struct Plan {
  int threads;
  int tile;              // tokens in shared memory at a time
  int chunk;             // rows of a D×E matrix in shared memory at a time
  int dim, value_dim;    // D and E, padded to a multiple of 4 with zeros
  int ld_dim, ld_value;  // their leading dimensions: an odd multiple of 4, so that 8 rows cover all banks
  double scale;          // softmax: D^-¼

  int tile_count() const { return 3 * dim + 2 * tile + tile * (ld_dim + ld_value); }
  int state_count() const { return tile_count() + chunk * ld_value; }
  int backward_count() const { return state_count() + tile * ld_dim; }
};

inline Plan make_plan(const LinearAttention& p, int accumulator_bytes) {
  Plan plan;
  plan.dim = p.dim > 0 ? round_up(int(p.dim), 4) : 4;
  plan.value_dim = p.value_dim > 0 ? round_up(int(p.value_dim), 4) : 4;
  plan.ld_dim = plan.dim | 4;
  plan.ld_value = plan.value_dim | 4;
  plan.scale = p.dim > 0 ? std::pow(double(p.dim), -0.25) : 1;
  const int state_tiles = plan.dim / 4 * (plan.value_dim / 4);
  plan.threads = state_tiles < 64 ? 64 : state_tiles > kMaxThreads ? kMaxThreads : round_up(state_tiles, 32);
  plan.tile = 32;
  while (plan.tile * (2 * plan.ld_dim + plan.ld_value) * accumulator_bytes > 28 * 1024) plan.tile /= 2;
  const int fits = 18 * 1024 / (plan.ld_value * accumulator_bytes) / 4 * 4;
  plan.chunk = plan.dim < fits ? plan.dim : fits;
  return plan;
}

// The numbers of splits. A pass that leaves a partial state per split has few, long ones: the partial states take at
// most an eighth of what q takes in 16 bits. The other passes have short ones, for more blocks.
inline void set_splits(LinearAttention& p, const Plan& plan, bool forward) {
  const auto count = [](int64_t n, int64_t size) { return n > size ? (n + size - 1) / size : 1; };
  const int64_t widest = p.dim > p.value_dim ? p.dim : p.value_dim;
  const int64_t run = 16 * (widest > 32 ? widest : 32);
  const auto few = [&](int64_t n) { return count(n, run) < 64 ? count(n, run) : 64; };
  p.key_splits = forward ? few(p.keys) : count(p.keys, 8 * plan.tile);
  p.query_splits = forward ? count(p.queries, 8 * plan.tile) : few(p.queries);
}

// -- One element -----------------------------------------------------------------------------------------------------

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }

// Four neighbors in shared memory, read at once.
template <class A>
struct alignas(16) Four {
  A x[4];
};
template <class A>
__device__ __forceinline__ const Four<A>& four(const A* p) {
  return *reinterpret_cast<const Four<A>*>(p);
}
template <class A>
__device__ __forceinline__ A dot(A sum, const Four<A>& a, const Four<A>& b) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum += a.x[i] * b.x[i];
  return sum;
}

// The elements of a rectangle `width` wide, dealt to a block's threads in turn.
struct Walk {
  const int width, rows_on, columns_on;
  int row, column;
  __device__ explicit Walk(int width)
      : width(width),
        rows_on(blockDim.x / width),
        columns_on(blockDim.x % width),
        row(threadIdx.x / width),
        column(threadIdx.x % width) {}
  __device__ void next() {
    row += rows_on;
    column += columns_on;
    if (column >= width) {
      column -= width;
      ++row;
    }
  }
};

// -- One block -------------------------------------------------------------------------------------------------------

extern __shared__ __align__(16) unsigned char shared_memory[];

template <class T>
struct Block {
  using A = typename Accumulate<T>::type;

  const LinearAttention& p;
  const Plan& plan;
  const int64_t head;
  const int D, E;
  const bool softmax, elu;  // elu: by its exponents
  const A scale;
  bool resident = false;  // is the whole matrix in `state`?
  A unit = 1;             // what S, z and eps are multiplied by in the query passes, see load_z()
  // Shared memory: three arrays of channels, two of tokens, the tiles of φ and of values, and where a pass has them
  // a chunk of the D×E matrix and a tile of gradients.
  A *channel[3], *token[2], *phi, *values, *state, *gradient;

  __device__ Block(const LinearAttention& p, const Plan& plan, int64_t head)
      : p(p),
        plan(plan),
        head(head),
        D(int(p.dim)),
        E(int(p.value_dim)),
        softmax(p.feature_map == FeatureMap::kSoftmax),
        elu(p.feature_map == FeatureMap::kEluExact),
        scale(A(plan.scale)) {
    A* next = reinterpret_cast<A*>(shared_memory);
    for (A*& array : channel) array = next, next += plan.dim;
    for (A*& array : token) array = next, next += plan.tile;
    phi = next;
    values = phi + plan.tile * plan.ld_dim;
    state = values + plan.tile * plan.ld_value;
    gradient = state + plan.chunk * plan.ld_value;
  }

  // f(n, rows) for each tile of this block's tokens.
  template <class F>
  __device__ void each_tile(int64_t tokens, int64_t splits, F&& f) const {
    const int64_t tiles = (tokens + plan.tile - 1) / plan.tile, per_split = (tiles + splits - 1) / splits;
    const int64_t begin = int64_t(blockIdx.x) % splits * per_split * plan.tile, end = begin + per_split * plan.tile;
    for (int64_t n = begin; n < end && n < tokens; n += plan.tile)
      f(n, int(tokens - n < plan.tile ? tokens - n : plan.tile));
  }

  template <class F>
  __device__ void each_channel(F&& f) const {
    for (int d = threadIdx.x; d < plan.dim; d += blockDim.x) f(d);
  }

  // f(element, row, column) for the first rows × columns of a tile, memory's neighbors for neighboring threads.
  template <class F>
  __device__ void each_element(const View& view, int64_t n, int rows, int columns, F&& f) const {
    T* const first = static_cast<T*>(view.data) + head / p.heads * view.stride[0] + head % p.heads * view.stride[1] +
                     n * view.stride[2];
    const bool turned = view.stride[2] < view.stride[3];
    for (Walk w(turned ? rows : columns); w.row < (turned ? columns : rows); w.next()) {
      const int row = turned ? w.column : w.row, column = turned ? w.row : w.column;
      f(first + row * view.stride[2] + column * view.stride[3], row, column);
    }
  }

  // A tile, rows to a multiple of 4 and columns to ld's; map(x, column) where there is a seen token, else `padding`.
  template <class Map>
  __device__ void load(A* tile, int ld, const View& view, int64_t n, int rows, int channels, const A* seen, A padding,
                       Map&& map) const {
    each_element(view, n, round_up(rows, 4), round_up(channels > 0 ? channels : 1, 4), [&](const T* x, int t, int c) {
      const bool there = t < rows && c < channels && (seen == nullptr || seen[t] != 0);
      tile[t * ld + c] = there ? map(widen(*x), c) : padding;
    });
  }
  __device__ void load_values(const View& view, int64_t n, int rows, const A* seen) const {
    load(values, plan.ld_value, view, n, rows, E, seen, A(0), [](A x, int) { return x; });
  }

  // seen[t] = 1 where there is a token and the mask shows it.
  __device__ void load_mask(A* seen, int64_t n, int rows) const {
    const bool* mask = p.key_mask;
    if (mask != nullptr) mask += head / p.heads * p.mask_stride[0] + n * p.mask_stride[1];
    for (int t = threadIdx.x; t < plan.tile; t += blockDim.x)
      seen[t] = t < rows && (mask == nullptr || mask[t * p.mask_stride[1]]) ? A(1) : A(0);
  }

  // elu + 1 or relu.
  __device__ A feature(A x) const {
    if (x > 0) return p.feature_map == FeatureMap::kElu ? x + 1 : x;
    return p.feature_map == FeatureMap::kElu ? exponential(x) : x != x ? x : A(0);
  }
  // elu's φ(x)·exp(−shift): min(x, 0) is its exponent.
  __device__ A elu_of(A x, A shift) const {
    return x > 0 ? exponential(-shift) * (x + 1) : exponential(x - shift);
  }
  // φ'(x) of the element (n, d) of this head, given φ(x).
  __device__ A derivative(A f, const View& view, int64_t n, int d) const {
    if (!elu) return derivative(f);
    const A x = widen(static_cast<const T*>(view.data)[head / p.heads * view.stride[0] + head % p.heads * view.stride[1] +
                                                       n * view.stride[2] + d * view.stride[3]]);
    return x > 0 ? f / (x + 1) : f;
  }
  // φ'(x), given φ(x).
  __device__ A derivative(A f) const {
    if (softmax) return scale * f;
    return p.feature_map == FeatureMap::kElu ? (f < 1 ? f : A(1)) : f > 0 ? A(1) : A(0);
  }

  // What the query passes weigh φ(q) with in their denominator.
  // Of relu a power of two more, which makes the largest z at least 2^24: φ(q)·z is then no subnormal number.
  __device__ void load_z(A* z) {
    const A* stat = static_cast<const A*>(p.key_stat) + head * D;
    A most = 0;
    for (int d = 0; d < D; ++d) most = stat[d] > most ? stat[d] : most;
    if (!softmax && !elu && most > 0 && most <= A(3.4e38)) {
      int exponent = 24 - ilogb(most);
      if (p.eps > 0 && -ilogb(p.eps) < exponent) exponent = -ilogb(p.eps);  // an eps that outweighs φ(q)·z: near 1
      unit = ldexp(A(1), exponent < 127 ? exponent : 127);
    }
    // elu's z is in the exponents, `channel[2]` then; where it is 0, the statistic is +∞.
    each_channel([&](int d) {
      z[d] = d >= D ? A(0) : softmax || elu ? A(1) : stat[d] * unit;
      channel[2][d] = !elu || d >= D || stat[d] == A(INFINITY) ? -A(INFINITY) : stat[d];
    });
  }
  // φ(q); the softmax overwrites `top`. No barrier before or after.
  __device__ void load_queries(int64_t n, int rows, A* top) const {
    load(phi, plan.ld_dim, p.q, n, rows, D, nullptr, softmax ? -A(INFINITY) : A(0),
         [&](A x, int) { return softmax ? scale * x : elu ? x : feature(x); });
    if (!softmax && !elu) return;
    const A* bias = channel[2];
    __syncthreads();
    for (int t = threadIdx.x; t < rows; t += blockDim.x) {
      A max = -A(INFINITY);
      for (int d = 0; d < plan.dim; d += 4) {
        const Four<A> x = four(phi + t * plan.ld_dim + d);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const A exponent = elu ? (x.x[i] > 0 ? A(0) : x.x[i]) + bias[d + i] : x.x[i];
          max = exponent > max ? exponent : max;
        }
      }
      top[t] = elu && max == -A(INFINITY) ? A(0) : max;
    }
    __syncthreads();
    for (Walk w(plan.dim); w.row < round_up(rows, 4); w.next()) {
      A& x = phi[w.row * plan.ld_dim + w.column];
      x = w.row >= rows || w.column >= D ? A(0)
          : elu                          ? elu_of(x, top[w.row] - bias[w.column])
                                         : exponential(x - top[w.row]);
    }
  }
  __device__ A row_dot(const A* row, const A* other) const {
    A sum = 0;
    for (int d = 0; d < plan.dim; d += 4) sum = dot(sum, four(row + d), four(other + d));
    return sum;
  }
  __device__ A inverse_denominator(int t, const A* z) const {
    const A eps = p.feature_map == FeatureMap::kRelu ? A(p.eps * unit) : A(0);
    const A denominator = row_dot(phi + t * plan.ld_dim, z) + eps;
    return denominator == 0 ? A(1) : A(1) / denominator;
  }

  // f(first row, rows) for each chunk of this head's D×E matrix, in `state`. A barrier comes before each.
  template <class F>
  __device__ void each_chunk(const void* matrix, F&& f) {
    for (int first = 0; first < plan.dim; first += plan.chunk) {
      const int rows = plan.dim - first < plan.chunk ? plan.dim - first : plan.chunk;
      __syncthreads();
      if (!resident) {
        const A factor = matrix == p.state ? unit : A(1);
        const A* from = static_cast<const A*>(matrix) + (head * D + first) * E;
        for (Walk w(plan.value_dim); w.row < rows; w.next())
          state[w.row * plan.ld_value + w.column] =
              first + w.row < D && w.column < E ? from[w.row * E + w.column] * factor : A(0);
        resident = plan.chunk >= plan.dim;
        __syncthreads();
      }
      f(first, rows);
    }
  }

  // values (tokens × E) = φ · the matrix.
  __device__ void read_out(const void* matrix, int rows) {
    each_chunk(matrix, [&](int first, int depth) {
      const int columns = plan.value_dim / 4;
      for (int i = threadIdx.x; i < round_up(rows, 4) / 4 * columns; i += blockDim.x) {
        const A* f = phi + i / columns * 4 * plan.ld_dim + first;
        const A* s = state + i % columns * 4;
        A* out = values + i / columns * 4 * plan.ld_value + i % columns * 4;
        A sum[4][4];
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[r][c] = first == 0 ? A(0) : out[r * plan.ld_value + c];
        for (int d = 0; d < depth; d += 4) {
          Four<A> a[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) a[r] = four(f + r * plan.ld_dim + d);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const Four<A> b = four(s + (d + j) * plan.ld_value);
#pragma unroll
            for (int r = 0; r < 4; ++r)
#pragma unroll
              for (int c = 0; c < 4; ++c) sum[r][c] += a[r].x[j] * b.x[c];
          }
        }
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c) out[r * plan.ld_value + c] = sum[r][c];
      }
    });
  }

  // gradient (tokens × D) = values · the matrix, transposed.
  __device__ void read_back(const void* matrix, int rows) {
    each_chunk(matrix, [&](int first, int depth) {
      const int columns = depth / 4;  // a thread's 4 columns lie this far apart: neighbors read neighboring rows
      for (int i = threadIdx.x; i < round_up(rows, 4) / 4 * columns; i += blockDim.x) {
        const A* y = values + i / columns * 4 * plan.ld_value;
        const A* s = state + i % columns * plan.ld_value;
        A* out = gradient + i / columns * 4 * plan.ld_dim + first + i % columns;
        A sum[4][4] = {};
        for (int e = 0; e < plan.value_dim; e += 4) {
          Four<A> a[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) a[r] = four(y + r * plan.ld_value + e);
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const Four<A> b = four(s + c * columns * plan.ld_value + e);
#pragma unroll
            for (int r = 0; r < 4; ++r) sum[r][c] = dot(sum[r][c], a[r], b);
          }
        }
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c) out[r * plan.ld_dim + c * columns] = sum[r][c];
      }
    });
  }
};

// A D×E sum over tokens, spread over the registers of a block's threads in tiles of 4×4.
template <class A>
struct State {
  A sum[kRegisterTiles][4][4] = {};

  // f(k, d, e) for each of this thread's tiles.
  template <class F>
  __device__ __forceinline__ void each(const Plan& plan, F&& f) {
    const int columns = plan.value_dim / 4, tiles = plan.dim / 4 * columns;
#pragma unroll
    for (int k = 0; k < kRegisterTiles; ++k) {
      const int i = threadIdx.x + k * blockDim.x;
      if (i < tiles) f(k, i / columns * 4, i % columns * 4);
    }
  }
  // sum = factor ⊙ sum + φᵀ · values; factor, one per row, may be null.
  __device__ __forceinline__ void fold(const Plan& plan, const A* phi, const A* values, int rows,
                                       const A* factor = nullptr) {
    each(plan, [&](int k, int d, int e) {
      if (factor != nullptr)
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[k][r][c] *= factor[d + r];
#pragma unroll 4
      for (int t = 0; t < rows; ++t) {
        const Four<A> f = four(phi + t * plan.ld_dim + d), y = four(values + t * plan.ld_value + e);
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[k][r][c] += f.x[r] * y.x[c];
      }
    });
  }
  __device__ __forceinline__ void store(const Plan& plan, A* to, int D, int E, A factor = 1) {
    each(plan, [&](int k, int d, int e) {
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (d + r < D && e + c < E) to[(d + r) * E + e + c] = sum[k][r][c] * factor;
    });
  }
};

// -- The passes ------------------------------------------------------------------------------------------------------

// block = head · key_splits + split
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    key_pass(const __grid_constant__ LinearAttention p, const __grid_constant__ Plan plan) {
  Block<T> b(p, plan, blockIdx.x / p.key_splits);
  using A = typename Block<T>::A;
  A *max = b.channel[0], *z = b.channel[1], *factor = b.channel[2], *seen = b.token[0];
  const int D = b.D, ld = plan.ld_dim;
  State<A> S;
  b.each_channel([&](int d) {
    max[d] = -A(INFINITY);
    z[d] = 0;
    factor[d] = 1;
  });
  b.each_tile(p.keys, p.key_splits, [&](int64_t n, int rows) {
    b.load_mask(seen, n, rows);
    __syncthreads();
    b.load(b.phi, ld, p.k, n, rows, D, seen, A(0), [&](A x, int) { return b.softmax ? b.scale * x : b.elu ? x : b.feature(x); });
    b.load_values(p.v, n, rows, seen);
    __syncthreads();
    if (b.softmax || b.elu) {
      // The running maximum: z and S are rescaled by exp(old − new), exact in one pass.
      b.each_channel([&](int d) {
        A top = max[d];
        for (int t = 0; t < rows; ++t) {
          const A x = b.phi[t * ld + d], exponent = b.elu && x > 0 ? A(0) : x;
          if (seen[t] != 0 && exponent > top) top = exponent;
        }
        factor[d] = max[d] == top ? A(1) : exponential(max[d] - top);
        max[d] = top;
      });
      __syncthreads();
      for (Walk w(plan.dim); w.row < rows; w.next()) {
        const A top = max[w.column] > -A(INFINITY) ? max[w.column] : A(0);
        A& x = b.phi[w.row * ld + w.column];
        x = seen[w.row] == 0 || w.column >= D ? A(0) : b.elu ? b.elu_of(x, top) : exponential(x - top);
      }
      __syncthreads();
    }
    S.fold(plan, b.phi, b.values, rows, b.softmax || b.elu ? factor : nullptr);
    b.each_channel([&](int d) {
      A sum = z[d] * factor[d];
      for (int t = 0; t < rows; ++t) sum += b.phi[t * ld + d];
      z[d] = sum;
    });
  });
  A* partial = static_cast<A*>(p.partial) + blockIdx.x * (2 * p.dim + p.dim * p.value_dim);
  b.each_channel([&](int d) {
    if (d >= D) return;
    partial[d] = max[d];
    partial[D + d] = z[d];
  });
  S.store(plan, partial + 2 * D, D, b.E);
}

// block = head · D + d; any number of threads
template <class A>
__global__ void key_reduce(const __grid_constant__ LinearAttention p, const __grid_constant__ Plan) {
  const int64_t head = blockIdx.x / p.dim, d = blockIdx.x % p.dim, size = 2 * p.dim + p.dim * p.value_dim;
  const A* partial = static_cast<const A*>(p.partial) + head * p.key_splits * size;
  const bool shifted = p.feature_map == FeatureMap::kSoftmax || p.feature_map == FeatureMap::kEluExact;
  A max = -A(INFINITY), z = 0;
  if (shifted)
    for (int64_t s = 0; s < p.key_splits; ++s) max = partial[s * size + d] > max ? partial[s * size + d] : max;
  const auto weight = [&](int64_t s) {
    const A own = partial[s * size + d];
    return own == max || !shifted ? A(1) : exponential(own - max);
  };
  for (int64_t s = 0; s < p.key_splits; ++s) z += weight(s) * partial[s * size + p.dim + d];
  for (int64_t e = threadIdx.x; e < p.value_dim; e += blockDim.x) {
    A sum = 0;
    for (int64_t s = 0; s < p.key_splits; ++s) sum += weight(s) * partial[s * size + 2 * p.dim + d * p.value_dim + e];
    static_cast<A*>(p.state)[blockIdx.x * p.value_dim + e] = shifted && z != 0 ? sum / z : sum;
  }
  // No key is seen: exp(k − ∞) = 0 makes every φ(k) of the backward pass 0.
  if (threadIdx.x == 0)
    static_cast<A*>(p.key_stat)[blockIdx.x] = !shifted ? z : z == 0 ? A(INFINITY) : max + logarithm(z);
}

// block = head · query_splits + split
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    query_pass(const __grid_constant__ LinearAttention p, const __grid_constant__ Plan plan) {
  Block<T> b(p, plan, blockIdx.x / p.query_splits);
  using A = typename Block<T>::A;
  A *z = b.channel[0], *inverse = b.token[1];
  b.load_z(z);
  b.each_tile(p.queries, p.query_splits, [&](int64_t n, int rows) {
    b.load_queries(n, rows, b.token[0]);
    b.read_out(p.state, rows);
    for (int t = threadIdx.x; t < rows; t += blockDim.x) inverse[t] = b.inverse_denominator(t, z);
    __syncthreads();
    b.each_element(p.out, n, rows, plan.value_dim, [&](T* out, int t, int e) {
      if (e < b.E) narrow(b.values[t * plan.ld_value + e] * inverse[t], out);
    });
  });
}

// block = head · query_splits + split. With G = dO Sᵀ, den = φ(q)·z + eps and c = φ(q)·G / den:
// dφ(q) = (G − c zᵀ)/den, dS = Σ (φ(q)/den)ᵀ dO, dz = −Σ φ(q)/den · c.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    query_backward(const __grid_constant__ LinearAttention p, const __grid_constant__ Plan plan) {
  Block<T> b(p, plan, blockIdx.x / p.query_splits);
  using A = typename Block<T>::A;
  A *z = b.channel[0], *dz = b.channel[1], *c = b.token[0], *inverse = b.token[1];
  const int D = b.D, ld = plan.ld_dim;
  // dz is of grad_k alone, and the softmax has none here.
  const bool of_queries = p.grad_q.data != nullptr, of_keys = p.grad_k.data != nullptr || p.grad_v.data != nullptr;
  const bool with_G = of_queries || (p.grad_k.data != nullptr && !b.softmax);
  State<A> dS;
  b.load_z(z);
  b.each_channel([&](int d) { dz[d] = 0; });
  b.each_tile(p.queries, p.query_splits, [&](int64_t n, int rows) {
    __syncthreads();
    b.load_queries(n, rows, b.token[0]);
    b.load_values(p.grad_out, n, rows, nullptr);
    if (with_G) b.read_back(p.state, rows);
    __syncthreads();
    for (int t = threadIdx.x; t < rows; t += blockDim.x) {
      inverse[t] = b.inverse_denominator(t, z);
      c[t] = with_G ? b.row_dot(b.phi + t * ld, b.gradient + t * ld) * inverse[t] : A(0);
    }
    __syncthreads();
    b.each_element(p.grad_q, n, rows, plan.dim, [&](T* grad_q, int t, int d) {
      A& f = b.phi[t * ld + d];
      if (of_queries && d < D)
        narrow((b.gradient[t * ld + d] - c[t] * z[d]) * inverse[t] * b.derivative(f, p.q, n + t, d), grad_q);
      f *= inverse[t];
    });
    if (!of_keys) return;
    __syncthreads();
    dS.fold(plan, b.phi, b.values, rows);
    b.each_channel([&](int d) {
      A sum = dz[d];
      for (int t = 0; t < rows; ++t) sum -= b.phi[t * ld + d] * c[t];
      dz[d] = sum;
    });
  });
  if (!of_keys) return;
  A* partial = static_cast<A*>(p.partial) + blockIdx.x * (p.dim + p.dim * p.value_dim);
  b.each_channel([&](int d) {
    if (d < D) partial[d] = dz[d] * b.unit;
  });
  dS.store(plan, partial + D, D, b.E, b.unit);
}

// block = head · D + d; any number of threads
template <class A>
__global__ void query_backward_reduce(const __grid_constant__ LinearAttention p, const __grid_constant__ Plan) {
  const int64_t head = blockIdx.x / p.dim, d = blockIdx.x % p.dim, size = p.dim + p.dim * p.value_dim;
  const A* partial = static_cast<const A*>(p.partial) + head * p.query_splits * size;
  const A* S = static_cast<const A*>(p.state) + blockIdx.x * p.value_dim;
  A* dS = static_cast<A*>(p.grad_state) + blockIdx.x * p.value_dim;
  A* product = reinterpret_cast<A*>(shared_memory);
  for (int64_t e = threadIdx.x; e < p.value_dim; e += blockDim.x) {
    A sum = 0;
    for (int64_t s = 0; s < p.query_splits; ++s) sum += partial[s * size + p.dim + d * p.value_dim + e];
    dS[e] = sum;
    product[e] = sum * S[e];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  A dz = 0;
  if (p.feature_map == FeatureMap::kSoftmax)
    for (int64_t e = 0; e < p.value_dim; ++e) dz -= product[e];
  else
    for (int64_t s = 0; s < p.query_splits; ++s) dz += partial[s * size + d];
  static_cast<A*>(p.grad_z)[blockIdx.x] = dz;
}

// block = head · key_splits + split. dφ(k) = v dSᵀ + dz and dv = φ(k) dS.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    key_backward(const __grid_constant__ LinearAttention p, const __grid_constant__ Plan plan) {
  Block<T> b(p, plan, blockIdx.x / p.key_splits);
  using A = typename Block<T>::A;
  A *stat = b.channel[0], *dz = b.channel[1], *seen = b.token[0];
  const int D = b.D, ld = plan.ld_dim;
  const bool of_keys = p.grad_k.data != nullptr;
  b.each_channel([&](int d) {
    stat[d] = d < D ? static_cast<const A*>(p.key_stat)[b.head * D + d] : A(0);
    dz[d] = d < D ? static_cast<const A*>(p.grad_z)[b.head * D + d] : A(0);
  });
  b.each_tile(p.keys, p.key_splits, [&](int64_t n, int rows) {
    b.load_mask(seen, n, rows);
    __syncthreads();
    b.load(b.phi, ld, p.k, n, rows, D, seen, A(0),
           [&](A x, int d) {
             return b.softmax ? exponential(b.scale * x - stat[d]) : b.elu ? b.elu_of(x, stat[d]) : b.feature(x);
           });
    if (of_keys) {
      b.load_values(p.v, n, rows, seen);
      b.read_back(p.grad_state, rows);
      __syncthreads();
      b.each_element(p.grad_k, n, rows, plan.dim, [&](T* grad_k, int t, int d) {
        if (d < D) narrow((b.gradient[t * ld + d] + dz[d]) * b.derivative(b.phi[t * ld + d], p.k, n + t, d), grad_k);
      });
    }
    if (p.grad_v.data == nullptr) return;
    b.read_out(p.grad_state, rows);
    __syncthreads();
    b.each_element(p.grad_v, n, rows, plan.value_dim, [&](T* grad_v, int t, int e) {
      if (e < b.E) narrow(b.values[t * plan.ld_value + e], grad_v);
    });
  });
}

// -- Launches --------------------------------------------------------------------------------------------------------

// In order: launch(kernel, blocks, threads, bytes of shared memory).
template <class T, class Launch>
void key_state(const LinearAttention& p, const Plan& plan, Launch&& launch) {
  using A = typename Accumulate<T>::type;
  const int64_t heads = p.batch * p.heads;
  launch(key_pass<T>, heads * p.key_splits, plan.threads, int(plan.tile_count() * sizeof(A)));
  launch(key_reduce<A>, heads * p.dim, round_up(plan.value_dim, 32), 0);
}

template <class T, class Launch>
void forward(const LinearAttention& p, const Plan& plan, Launch&& launch) {
  using A = typename Accumulate<T>::type;
  key_state<T>(p, plan, launch);
  launch(query_pass<T>, p.batch * p.heads * p.query_splits, plan.threads, int(plan.state_count() * sizeof(A)));
}

template <class T, class Launch>
void key_gradients(const LinearAttention& p, const Plan& plan, Launch&& launch) {
  using A = typename Accumulate<T>::type;
  const int bytes = plan.backward_count() * sizeof(A);
  launch(key_backward<T>, p.batch * p.heads * p.key_splits, plan.threads, bytes);
}

template <class T, class Launch>
void backward(const LinearAttention& p, const Plan& plan, Launch&& launch) {
  using A = typename Accumulate<T>::type;
  const int64_t heads = p.batch * p.heads;
  const int bytes = plan.backward_count() * sizeof(A);
  launch(query_backward<T>, heads * p.query_splits, plan.threads, bytes);
  if (!has_key_gradients(p)) return;
  launch(query_backward_reduce<A>, heads * p.dim, round_up(plan.value_dim, 32), int(plan.value_dim * sizeof(A)));
  key_gradients<T>(p, plan, launch);
}

}  // namespace cuda
}  // namespace cxv
