#include "pool.h"

#include <atomic>
#include <mutex>
#include <system_error>
#include <thread>

#include "../core/portable.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace gradstep::cpu {
namespace {

std::atomic<int> width{1};
std::atomic<OpenMpParallel> openmp{nullptr};

// The tasks of one call, which threads take one at a time.
struct Job {
  std::int64_t n;
  void (*task)(void*, std::int64_t);
  void* context;
  std::atomic<std::int64_t> next{0};

  void work() {
    for (;;) {
      const std::int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= n) return;
      task(context, i);
    }
  }
};

// Workers sleep on `gate_`, whose value is (job number, workers inside the job, closed). A worker that wakes up joins the job
// if it is still open; the caller closes the job when no task is left and waits only for the workers inside. So a worker that
// the system wakes late delays nobody.
class Pool {
 public:
  bool run(int threads, Job& job) {
    const std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
    if (!lock) return false;
    start(threads - 1);

    job_ = &job;
    limit_ = threads - 1;
    gate_.store((gate_.load(std::memory_order_relaxed) & kJobs) + kJob, std::memory_order_release);  // opens the next job
    gate_.notify_all();

    job.work();

    std::uint64_t gate = gate_.fetch_or(kClosed, std::memory_order_acq_rel) | kClosed;
    while (gate & kInside) {
      relax();
      gate = gate_.load(std::memory_order_acquire);
    }
    return true;
  }

 private:
  static constexpr std::uint64_t kClosed = 1, kOne = 2, kInside = 0xfffe, kJob = 0x10000, kJobs = ~std::uint64_t{0xffff};
  static constexpr int kSpins = 2000;  // some tens of microseconds: the gap between the tensors of one step

  void start(int workers) {
    while (started_ < workers) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        return;  // the system gives no more threads: those that there are do the work
      }
      ++started_;
    }
  }

  bool join(std::uint64_t& gate) {
    while (!(gate & kClosed) && static_cast<int>((gate & kInside) / kOne) < limit_.load(std::memory_order_relaxed)) {
      if (gate_.compare_exchange_weak(gate, gate + kOne, std::memory_order_acq_rel)) return true;
    }
    return false;
  }

  void serve() {
    std::uint64_t done = 0;  // the job this worker has seen last
    for (;;) {
      std::uint64_t gate = gate_.load(std::memory_order_acquire);
      for (int i = 0; i < kSpins && (gate & kJobs) == done; ++i) {
        relax();
        gate = gate_.load(std::memory_order_acquire);
      }
      while ((gate & kJobs) == done) {
        gate_.wait(gate, std::memory_order_acquire);
        gate = gate_.load(std::memory_order_acquire);
      }
      done = gate & kJobs;
      if (!join(gate)) continue;
      job_->work();
      gate_.fetch_sub(kOne, std::memory_order_acq_rel);
    }
  }

  std::mutex busy_;
  std::atomic<std::uint64_t> gate_{kClosed};
  std::atomic<int> limit_{0};
  int started_ = 0;
  Job* job_ = nullptr;
};

// Never destroyed: its threads wait on it until the process ends. A forked child has none of them, so it leaves the parent's
// pool alone, whatever state it was in, and makes one of its own.
std::atomic<Pool*> the_pool{nullptr};

#if !defined(_WIN32)
// While the module is loaded, not at the first use: a fork beside that could find it half done.
[[maybe_unused]] const int start_anew_after_fork = pthread_atfork(nullptr, nullptr, [] {
  the_pool.store(nullptr);
  openmp.store(nullptr);
});
#endif

Pool& pool() {
  Pool* pool = the_pool.load(std::memory_order_acquire);
  if (pool) return *pool;
  auto* fresh = new Pool;
  if (the_pool.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;
  return *pool;
}

}  // namespace

int num_threads() { return width.load(std::memory_order_relaxed); }

void set_num_threads(int n) { width.store(n, std::memory_order_relaxed); }

void set_openmp(OpenMpParallel parallel) { openmp.store(parallel); }

void parallel_for(std::int64_t n, void (*task)(void*, std::int64_t), void* context) {
  const int threads = static_cast<int>(n < num_threads() ? n : num_threads());
  Job job{n, task, context};
  if (threads > 1) {
    if (const OpenMpParallel parallel = openmp.load()) {
      return parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job, static_cast<unsigned>(threads), 0);
    }
    if (pool().run(threads, job)) return;
  }
  job.work();
}

}  // namespace gradstep::cpu
