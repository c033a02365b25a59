#include "simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cxv::cuda {
constexpr int kSharedLimit = 48 * 1024;  // what a block gets without asking
alignas(128) unsigned char shared_memory[kSharedLimit + 4096];
}  // namespace cxv::cuda

namespace {

using cxv::cuda::shared_memory;

constexpr int kStackBytes = 128 * 1024, kGranule = 2;  // bytes of shared memory that are watched as one
constexpr int64_t kGranules = sizeof shared_memory / kGranule;

enum class Op { kNone, kShuffleXor, kShuffle, kAny, kLdmatrix, kMma, kSyncThreads };

struct Fiber {
  ucontext_t context;
  jmp_buf registers;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool started = false, finished = false;
  Op op = Op::kNone;  // what it waits for
  const void* in;
  void* out;
};

// Who touched a granule last, and between which two barriers of the block.
struct Touch {
  uint32_t barrier = 0;
  int32_t thread = -1;  // kMany: several
};
constexpr int32_t kMany = -2;
struct Shadow {
  Touch write, read;
  uint32_t block = 0;  // in which it was written
};

struct Arena {
  const char* begin = nullptr;
  int64_t bytes = 0;
  const uint8_t* allowed = nullptr;
} arena;

class Machine {
 public:
  void run(int64_t blocks, int threads, int shared_bytes, unsigned seed, const std::function<void()>& body) {
    if (shared_bytes > cxv::cuda::kSharedLimit)
      throw std::runtime_error("more shared memory than a block gets without asking");
    threads_ = threads, shared_bytes_ = shared_bytes, shuffled_ = seed != 0, body_ = &body;
    failure_.clear();
    random_.seed(seed);
    while (int(fibers_.size()) < threads) fibers_.push_back(std::make_unique<Fiber>());
    blockDim = {unsigned(threads), 1, 1};
    gridDim = {unsigned(blocks), 1, 1};
    std::vector<int64_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    if (shuffled_) std::shuffle(order.begin(), order.end(), random_);
    for (const int64_t block : order) {
      blockIdx.x = unsigned(block);
      run_block();
      if (!failure_.empty()) throw std::runtime_error(failure_);
    }
  }

  // Called by a fiber: waits until all threads that must take part have come, and the last has done the work.
  void meet(Op op, const void* in = nullptr, void* out = nullptr) {
    Fiber& self = *fibers_[current_];
    self.op = op, self.in = in, self.out = out;
    const bool block = op == Op::kSyncThreads;
    const int first = block ? 0 : current_ / 32 * 32, last = block ? threads_ : std::min(first + 32, threads_);
    for (int i = first; i < last; ++i)
      if (fibers_[i]->op != op) return wait();
    if (block) {
      ++barrier_;
    } else if (last - first < 32) {
      fail("a collective of a warp that has fewer than 32 threads");
    } else {
      collective(op, first);
    }
    for (int i = first; i < last; ++i) {
      fibers_[i]->op = Op::kNone;
      if (i != current_) ready_.push_back(i);
    }
    if (shuffled_) {
      ready_.push_back(current_);
      wait();
    }
  }

  void access(const void* address, int64_t bytes, bool write) {
    if (current_ < 0) return;
    const char* p = static_cast<const char*>(address);
    const int64_t shared = p - reinterpret_cast<const char*>(shared_memory), global = p - arena.begin;
    if (shared >= 0 && shared < int64_t(sizeof shared_memory)) {
      if (shared + bytes > shared_bytes_) return fail("an access beyond the shared memory of the launch");
      if (bytes == 16 && shared % 16 != 0) return fail("a misaligned vector in shared memory");
      for (int64_t i = shared / kGranule; i < (shared + bytes + kGranule - 1) / kGranule; ++i) touch(shadow_[i], write);
    } else if (global >= 0 && global < arena.bytes) {
      if (bytes == 16 && reinterpret_cast<uintptr_t>(p) % 16 != 0) return fail("a misaligned vector in global memory");
      for (int64_t i = global; i < global + bytes; ++i)
        if (i >= arena.bytes || !(arena.allowed[i] & (write ? 2 : 1)))
          return fail(write ? "a write beside the tensors" : "a read beside the tensors");
    }
  }

 private:
  void run_block() {
    ++block_;
    ++barrier_;
    std::memset(shared_memory, 0xFF, sizeof shared_memory);  // NaN in every float
    ready_.resize(threads_);
    std::iota(ready_.rbegin(), ready_.rend(), 0);
    unfinished_ = threads_;
    for (int i = 0; i < threads_; ++i) fibers_[i]->started = fibers_[i]->finished = false, fibers_[i]->op = Op::kNone;
    if (_setjmp(scheduler_) == 0) next();
    current_ = -1;
    if (failure_.empty() && unfinished_ != 0)
      failure_ = "a barrier or warp collective that not all threads reach (or not the same one)";
  }

  // Gives up the processor: to a thread that can go on, or if there is none to run_block.
  void wait() {
    if (_setjmp(fibers_[current_]->registers) == 0) next();
  }
  [[noreturn]] void next() {
    if (ready_.empty() || !failure_.empty()) _longjmp(scheduler_, 1);
    if (shuffled_) std::swap(ready_[random_() % ready_.size()], ready_.back());
    current_ = ready_.back();
    ready_.pop_back();
    threadIdx.x = current_;
    Fiber& fiber = *fibers_[current_];
    if (fiber.started) _longjmp(fiber.registers, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, &Machine::enter, 0);
    setcontext(&fiber.context);
    std::abort();
  }
  static void enter();
  void live() {
    (*body_)();
    fibers_[current_]->finished = true;
    fibers_[current_]->op = Op::kNone;
    --unfinished_;
    next();
  }
  void fail(const char* why) {
    if (failure_.empty())
      failure_ =
          std::string(why) + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(current_) + ")";
    next();
  }

  // Did another thread do this, unordered with the current one?
  bool unordered(const Touch& t) const { return t.barrier == barrier_ && t.thread != current_; }
  void touch(Shadow& s, bool write) {
    if (unordered(s.write) || (write && unordered(s.read))) return fail("a race in shared memory");
    if (!write && s.block != block_) return fail("a read of shared memory that was not written");
    (write ? s.write : s.read) = {barrier_, !write && unordered(s.read) ? kMany : current_};
    if (write) s.block = block_;
  }

  void collective(Op op, int first);

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<int> ready_;
  std::vector<Shadow> shadow_ = std::vector<Shadow>(kGranules);
  std::mt19937 random_;
  const std::function<void()>* body_;
  std::string failure_;
  jmp_buf scheduler_;
  int threads_, shared_bytes_, unfinished_, current_ = -1;
  bool shuffled_;
  uint32_t block_ = 0, barrier_ = 0;
} machine;

void Machine::enter() { machine.live(); }

// -- Warp collectives -------------------------------------------------------------------------------------------------

struct Shuffle {
  float value;
  int lane;
};
struct Matrix {
  const void* row;
  bool transposed;
};
struct Mma {
  uint32_t a[2], b;
};

float to_float(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> t(65536);
    for (int i = 0; i < 65536; ++i) {
      const uint16_t x = uint16_t(i);
      _Float16 y;
      std::memcpy(&y, &x, 2);
      t[i] = float(y);
    }
    return t;
  }();
  return table[bits];
}

// D += A B as the PTX ISA lays m16n8k8 out over the lanes: with g = lane / 4 and t = lane % 4, register i of A holds
// row g + 8 i, columns 2t, 2t + 1; B holds rows 2t, 2t + 1, column g; D holds row g (i < 2) or g + 8, column 2t + (i &
// 1). A sum as the first tensor cores make it (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021): terms
// that are aligned to the largest lose the bits after its 24th, and so does the sum.
float add_truncated(const double (&terms)[5]) {
  double most = 0, plain = 0;
  for (double x : terms) most = std::max(most, std::fabs(x)), plain += x;
  if (most == 0 || !std::isfinite(plain)) return float(plain);
  const auto exponent = std::bit_cast<uint64_t>(most) >> 52;  // biased by 1023
  const double unit = std::bit_cast<double>((exponent - 23) << 52),
               units = std::bit_cast<double>((2069 - exponent) << 52);
  int64_t sum = 0;
  for (double x : terms) sum += int64_t(x * units);
  const float rounded = float(double(sum) * unit);
  return std::fabs(rounded) > std::fabs(double(sum) * unit) ? std::nextafter(rounded, 0.f) : rounded;
}

void multiply(const Mma* const (&in)[32], float* const (&out)[32]) {
  constexpr int K = 8;
  float A[16][K], B[8][K];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 2; ++i) A[g + 8 * i][2 * t + half] = to_float(uint16_t(in[lane]->a[i] >> 16 * half));
      B[g][2 * t + half] = to_float(uint16_t(in[lane]->b >> 16 * half));
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const float *a = A[lane / 4 + 8 * (i >> 1)], *b = B[lane % 4 * 2 + (i & 1)];
      for (int k = 0; k < K; k += 4) {
        const double terms[5] = {out[lane][i], double(a[k]) * b[k], double(a[k + 1]) * b[k + 1],
                                 double(a[k + 2]) * b[k + 2], double(a[k + 3]) * b[k + 3]};
        out[lane][i] = add_truncated(terms);
      }
    }
}

void Machine::collective(Op op, int first) {
  const auto in = [&]<class T>(int lane, T*) { return static_cast<const T*>(fibers_[first + lane]->in); };
  const auto out = [&](int lane) { return fibers_[first + lane]->out; };
  if (op == Op::kShuffleXor || op == Op::kShuffle)
    for (int lane = 0; lane < 32; ++lane) {
      const Shuffle& own = *in(lane, (Shuffle*)nullptr);
      const int from = op == Op::kShuffle ? own.lane : lane ^ own.lane;
      *static_cast<float*>(out(lane)) = in(from & 31, (Shuffle*)nullptr)->value;
    }
  if (op == Op::kAny) {
    int any = 0;
    for (int lane = 0; lane < 32; ++lane) any |= *in(lane, (int*)nullptr) != 0;
    for (int lane = 0; lane < 32; ++lane) *static_cast<int*>(out(lane)) = any;
  }
  if (op == Op::kLdmatrix) {
    const int self = current_;
    for (int m = 0; m < 4; ++m) {
      uint16_t matrix[8][8];
      for (int row = 0; row < 8; ++row) {
        const Matrix& own = *in(8 * m + row, (Matrix*)nullptr);
        if (reinterpret_cast<uintptr_t>(own.row) % 16 != 0) return fail("ldmatrix from an address not of 16 bytes");
        current_ = first + 8 * m + row;
        access(own.row, 16, false);
        std::memcpy(matrix[row], own.row, 16);
      }
      current_ = self;
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4 * 2;
        const bool turn = in(lane, (Matrix*)nullptr)->transposed;
        const uint32_t low = turn ? matrix[t][g] : matrix[g][t], high = turn ? matrix[t + 1][g] : matrix[g][t + 1];
        static_cast<uint32_t*>(out(lane))[m] = low | high << 16;
      }
    }
  }
  if (op == Op::kMma) {
    const Mma* registers[32];
    float* sums[32];
    for (int lane = 0; lane < 32; ++lane) {
      registers[lane] = in(lane, (Mma*)nullptr);
      sums[lane] = static_cast<float*>(out(lane));
    }
    multiply(registers, sums);
  }
}

}  // namespace

void __syncthreads() { machine.meet(Op::kSyncThreads); }
float __shfl_xor_sync(unsigned, float value, int lanes) {
  const Shuffle in = {value, lanes};
  float out;
  machine.meet(Op::kShuffleXor, &in, &out);
  return out;
}
float __shfl_sync(unsigned, float value, int lane) {
  const Shuffle in = {value, lane};
  float out;
  machine.meet(Op::kShuffle, &in, &out);
  return out;
}
int __any_sync(unsigned, int predicate) {
  int out;
  machine.meet(Op::kAny, &predicate, &out);
  return out;
}

namespace cxv::cuda::ptx {
void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed) {
  const Matrix in = {row, transposed};
  machine.meet(Op::kLdmatrix, &in, r);
}
void mma_m16n8k8_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  const Mma in = {{a0, a1}, b};
  machine.meet(Op::kMma, &in, c);
}
}  // namespace cxv::cuda::ptx

void simt::launch(int64_t blocks, int threads, int shared_bytes, unsigned seed, const std::function<void()>& body) {
  machine.run(blocks, threads, shared_bytes, seed, body);
}
unsigned simt::launch_seed = 0;
std::function<void(int, int)> simt::launch_observer;
const char* simt::guarded(const std::function<void()>& f) {
  static std::string error;
  try {
    f();
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}
// For processes without the fake device. With it, runtime.c is loaded first, and its functions are called instead.
extern "C" {
int fake_device_capturing() { return 0; }
void fake_device_record(void (*)(void*), void*) {}
void fake_device_launched(void*) {}
}
// The memory that tensors lie in: byte i may be read if allowed[i] & 1, written if allowed[i] & 2. Elsewhere, accesses
// are not checked.
extern "C" void simt_arena(const void* begin, int64_t bytes, const uint8_t* allowed) {
  arena = {static_cast<const char*>(begin), bytes, allowed};
}

// -- What -fsanitize=thread calls -------------------------------------------------------------------------------------

extern "C" {
#define SIMT_ACCESS(bytes)                                                        \
  void __tsan_read##bytes(void* p) { machine.access(p, bytes, false); }           \
  void __tsan_write##bytes(void* p) { machine.access(p, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* p) { machine.access(p, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { machine.access(p, bytes, true); }
SIMT_ACCESS(1)
SIMT_ACCESS(2) SIMT_ACCESS(4) SIMT_ACCESS(8) SIMT_ACCESS(16) void __tsan_read_range(void* p, unsigned long n) {
  machine.access(p, int64_t(n), false);
}
void __tsan_write_range(void* p, unsigned long n) { machine.access(p, int64_t(n), true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
int __tsan_atomic32_fetch_add(volatile int* p, int n, int) { return __atomic_fetch_add(p, n, __ATOMIC_SEQ_CST); }
}
