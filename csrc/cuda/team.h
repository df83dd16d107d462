// Threads of the host that run a program together, as those of a block on a GPU do, for tests: what a program forgets to wait
// for shows, at the latest under ThreadSanitizer.
#pragma once

#include <atomic>
#include <barrier>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "threads.h"

namespace gradstep::cuda {

// What the threads of a block share.
class Team {
 public:
  static constexpr std::uint32_t kLanes = 32;

  Team(std::uint32_t n, std::byte* memory) : n_(n), memory_(memory), all_(n), exchanged_(n) {
    for (std::uint32_t warp = 0; warp < n / kLanes; ++warp) warps_.push_back(std::make_unique<std::barrier<>>(kLanes));
  }

  // Runs program(threads) on every thread.
  template <class Program>
  void run(Program program);

 private:
  friend class TeamThreads;

  const std::uint32_t n_;
  std::byte* memory_;
  std::barrier<> all_;
  std::vector<std::unique_ptr<std::barrier<>>> warps_;
  std::vector<double> exchanged_;
};

class TeamThreads {
 public:
  TeamThreads(Team& team, std::uint32_t index) : team_(team), index_(index) {}

  std::uint32_t first() const { return index_; }
  std::uint32_t count() const { return team_.n_; }
  void sync() const { team_.all_.arrive_and_wait(); }
  std::uint32_t warp() const { return index_ / Team::kLanes; }
  std::uint32_t n_warps() const { return team_.n_ / Team::kLanes; }
  std::uint32_t lane() const { return index_ % Team::kLanes; }
  std::uint32_t lanes() const { return Team::kLanes; }
  std::byte* shared() const { return team_.memory_; }

  template <Term kTerm, class T, class Get>
  double leaf_sum(std::uint32_t size, Get get) const {
    double sum = 0;
    for (std::uint32_t i = lane(); i < size; i += Team::kLanes) {
      const double x = static_cast<double>(get(i));
      sum += kTerm == Term::kElement ? x : x * x;
    }
    for (std::uint32_t apart = 16; apart > 0; apart /= 2) {
      const double other = of_lane(sum, lane() + apart < Team::kLanes ? lane() + apart : lane());
      sum += other;
    }
    return of_lane(sum, 0);
  }
  template <class N>
  N warp_max(N x) const {
    for (std::uint32_t apart = 16; apart > 0; apart /= 2) {
      const N other = of_lane(x, lane() ^ apart);
      x = other > x ? other : x;
    }
    return x;
  }
  template <class N>
  N warp_sum(N x) const {
    for (std::uint32_t apart = 16; apart > 0; apart /= 2) x += of_lane(x, lane() ^ apart);
    return x;
  }
  static void lower_to(std::uint64_t& at, std::uint64_t value) {
    std::atomic_ref<std::uint64_t> now(at);
    std::uint64_t before = now.load();
    while (value < before && !now.compare_exchange_weak(before, value)) {
    }
  }

 private:
  // What another lane of the warp has.
  template <class N>
  N of_lane(N x, std::uint32_t lane) const {
    static_assert(sizeof(N) <= sizeof(double));
    auto& barrier = *team_.warps_[warp()];
    std::memcpy(&team_.exchanged_[index_], &x, sizeof x);
    barrier.arrive_and_wait();
    N other;
    std::memcpy(&other, &team_.exchanged_[warp() * Team::kLanes + lane], sizeof other);
    barrier.arrive_and_wait();
    return other;
  }

  Team& team_;
  const std::uint32_t index_;
};

template <class Program>
void Team::run(Program program) {
  std::vector<std::thread> threads;
  for (std::uint32_t i = 0; i < n_; ++i) threads.emplace_back([&, i] { program(TeamThreads(*this, i)); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace gradstep::cuda
