// Small kernels that do one thing wrong, or right, for test_emulator.py.
#include <exception>
#include <string>

#include "cuda/mma.cuh"

namespace cxv::cuda {

extern __shared__ __align__(16) unsigned char shared_memory[];

namespace {

int* words() { return reinterpret_cast<int*>(shared_memory); }

// Thread i reads what thread i + `distance` wrote.
void exchange(int distance, bool barrier) {
  words()[threadIdx.x] = 0;
  __syncthreads();
  words()[threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  volatile int sink = words()[(threadIdx.x + distance) % blockDim.x];
  (void)sink;
}

// D (16 × 8) = A (16 × 16) Bᵀ (8 × 16, twice) by load_fragment and mma; `swapped`: two registers of A the other way
// round.
template <class T>
void product(const float* A, const float* B, float* D, bool transposed, bool swapped) {
  constexpr int ld = 24;
  T* a = reinterpret_cast<T*>(shared_memory);
  T* b = a + 16 * ld;
  for (int i = threadIdx.x; i < 256; i += 32) {
    const int row = i / 16, depth = i % 16, at = transposed ? depth * ld + row : row * ld + depth;
    from_float(A[i], &a[at]);
    from_float(B[i], &b[at]);
  }
  __syncthreads();
  Pair<T> fa[4], fb[4];
  load_fragment<Operand::kA>(fa, a, ld, 0, 0, transposed);
  load_fragment<Operand::kB>(fb, b, ld, 0, 0, transposed);
  if (swapped) {
    const Pair<T> x = fa[1];
    fa[1] = fa[2];
    fa[2] = x;
  }
  float c[2][4] = {};
  mma(c, fa, fb);
  const int g = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
  for (int i = 0; i < 8; ++i) D[(g + i / 2 % 2 * 8) * 16 + i / 4 * 8 + t + i % 2] = c[i / 4][i % 4];
}

void run(const std::string& name) {
  const int i = threadIdx.x;
  float* const f = reinterpret_cast<float*>(shared_memory);
  if (name == "race") exchange(32, false);
  if (name == "race in a warp") exchange(1, false);
  if (name == "ordered") exchange(33, true);
  if (name == "race of a read and a later write") {
    words()[i] = i;
    __syncthreads();
    volatile int sink = words()[i];
    (void)sink;
    words()[(i + 32) % 64] = 0;
  }
  if (name == "barrier of some" && i != 5) __syncthreads();
  if (name == "collective of some" && i != 37) __shfl_xor_sync(~0u, 1.f, 1);
  if (name == "collectives of two kinds") i % 2 ? void(__any_sync(~0u, 1)) : void(__shfl_sync(~0u, 1.f, 0));
  if (name == "unwritten") f[i] = f[i + 64];
  if (name == "beyond") f[i + 200] = 1;
  if (name == "misaligned") {
    for (int j = 0; j < 3; ++j) f[i + 64 * j] = 1;
    __syncthreads();
    uint32_t r[4];
    ptx::ldmatrix(r, f + i % 32 + 1, false);
  }
}

}  // namespace
}  // namespace cxv::cuda

extern "C" {

// 64 threads, 800 bytes of shared memory.
const char* simt_self_test(const char* name, unsigned seed) {
  return simt::guarded([&] { simt::launch(2, 64, 800, seed, [&] { cxv::cuda::run(name); }); });
}

// y[i + offset] = x[i + offset] in each thread i.
const char* simt_copy(const float* x, float* y, int offset) {
  return simt::guarded([&] { simt::launch(1, 32, 0, 0, [&] { y[threadIdx.x + offset] = x[threadIdx.x + offset]; }); });
}

const char* simt_product(int dtype, const float* A, const float* B, float* D, bool transposed, bool swapped) {
  using namespace cxv::cuda;
  return simt::guarded([&] {
    simt::launch(1, 32, 2 * 16 * 24 * 4, 1, [&] {
      if (dtype == 0) product<__half>(A, B, D, transposed, swapped);
      if (dtype == 1) product<float>(A, B, D, transposed, swapped);
    });
  });
}
}
