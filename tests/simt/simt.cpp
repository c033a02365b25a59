#include "simt.h"

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

thread_local Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cxv::cuda {
constexpr int kSharedBytes = 48 * 1024, kGuardBytes = 16 * 1024;
alignas(16) unsigned char shared_memory[kSharedBytes + kGuardBytes];
}  // namespace cxv::cuda

namespace {

using namespace cxv::cuda;

// The threads of one launch, and the barrier they meet at: in __syncthreads and at the end of a block.
class Team {
 public:
  Team(int64_t blocks, int threads, int shared_bytes, unsigned seed)
      : threads_(threads), shared_bytes_(shared_bytes), seed_(seed), order_(blocks), barrier_(threads, Arrive{this}) {
    if (shared_bytes > kSharedBytes) throw std::runtime_error("more shared memory than a block gets without asking");
    std::iota(order_.begin(), order_.end(), 0);
    if (seed != 0) std::shuffle(order_.begin(), order_.end(), std::mt19937(seed));
    std::memset(shared_memory, 0xFF, sizeof shared_memory);
  }

  void run(int thread, const std::function<void()>& body) {
    random_.seed(seed_ + 977 * thread);
    threadIdx.x = thread;
    blockDim = {unsigned(threads_), 1, 1};
    gridDim = {unsigned(order_.size()), 1, 1};
    current_ = this;
    for (const int64_t block : order_) {
      blockIdx.x = unsigned(block);
      stumble();
      try {
        body();
      } catch (const Stop&) {
        return;
      }
      finished_.fetch_add(1);
      barrier_.arrive_and_wait();
      if (failure_ != nullptr) return;
    }
  }
  void sync() {
    stumble();
    barrier_.arrive_and_wait();
    if (failure_ != nullptr) throw Stop();
    stumble();
  }
  const char* failure() const { return failure_; }

  static thread_local Team* current_;

 private:
  struct Stop {};
  struct Arrive {
    Team* team;
    void operator()() noexcept { team->arrived(); }
  };
  // Runs alone, when all threads are at the barrier.
  void arrived() {
    const int finished = finished_.exchange(0);
    if (finished == 0) return;
    if (finished != threads_) failure_ = "a barrier that not all threads of the block reach";
    for (int i = shared_bytes_; i < kSharedBytes + kGuardBytes; ++i)
      if (shared_memory[i] != 0xFF) failure_ = "a write beyond the shared memory of the launch";
    std::memset(shared_memory, 0xFF, shared_bytes_);
  }
  void stumble() {
    if (seed_ == 0) return;
    for (unsigned i = random_() % 4; i > 0; --i) std::this_thread::yield();
  }

  const int threads_, shared_bytes_;
  const unsigned seed_;
  std::vector<int64_t> order_;
  std::atomic<int> finished_ = 0;
  const char* failure_ = nullptr;
  std::barrier<Arrive> barrier_;
  static thread_local std::minstd_rand random_;
};

thread_local Team* Team::current_ = nullptr;
thread_local std::minstd_rand Team::random_;

}  // namespace

void __syncthreads() { Team::current_->sync(); }

void simt::launch(int64_t blocks, int threads, int shared_bytes, unsigned seed, const std::function<void()>& body) {
  if (blocks == 0) return;
  Team team(blocks, threads, shared_bytes, seed);
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (seed != 0) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  std::vector<std::thread> running;
  for (const int thread : order) running.emplace_back([&, thread] { team.run(thread, body); });
  for (std::thread& thread : running) thread.join();
  if (team.failure() != nullptr) throw std::runtime_error(team.failure());
}
