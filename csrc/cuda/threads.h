// The threads that run a program: those of a block on a GPU, or one of the host, which does the work of all of them. Programs
// are written so that either will do: loops over elements go from `first()` in steps of `count()`, sums and maxima are a matter
// of a warp, and `sync()` stands between what some threads write and others read.
#pragma once

#include "../core/norms.h"

namespace gradstep::cuda {

// One thread of the host.
struct HostThreads {
  std::byte* memory;  // in the place of shared memory

  std::uint32_t first() const { return 0; }
  std::uint32_t count() const { return 1; }
  void sync() const {}
  std::uint32_t warp() const { return 0; }
  std::uint32_t n_warps() const { return 1; }
  std::uint32_t lane() const { return 0; }
  std::uint32_t lanes() const { return 1; }
  std::byte* shared() const { return memory; }

  // The sum of a leaf whose elements are get(0), get(1), ...: see norms.h. Every lane has it.
  template <Term kTerm, class T, class Get>
  double leaf_sum(std::uint32_t size, Get get) const {
    T elements[kTile];
    for (std::uint32_t i = 0; i < size; ++i) elements[i] = get(i);
    return gradstep::leaf_sum<kTerm>(size, Addend<T>{elements});
  }
  template <class N>
  N warp_max(N x) const {
    return x;
  }
  template <class N>
  N warp_sum(N x) const {
    return x;
  }
  static void lower_to(std::uint64_t& at, std::uint64_t value) { at = value < at ? value : at; }
};

#if defined(__CUDACC__)
struct GpuThreads {
  __device__ std::uint32_t first() const { return threadIdx.x; }
  __device__ std::uint32_t count() const { return blockDim.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ std::uint32_t warp() const { return threadIdx.x / 32; }
  __device__ std::uint32_t n_warps() const { return blockDim.x / 32; }
  __device__ std::uint32_t lane() const { return threadIdx.x % 32; }
  __device__ std::uint32_t lanes() const { return 32; }
  __device__ std::byte* shared() const {
    extern __shared__ double shared_memory[];
    return reinterpret_cast<std::byte*>(shared_memory);
  }

  template <Term kTerm, class T, class Get>
  __device__ double leaf_sum(std::uint32_t size, Get get) const {
    double sum = 0;
#pragma unroll 8
    for (std::uint32_t i = lane(); i < size; i += 32) {
      const double x = static_cast<double>(get(i));
      sum += kTerm == Term::kElement ? x : x * x;
    }
    for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_down_sync(kAll, sum, apart);
    return __shfl_sync(kAll, sum, 0);
  }
  template <class N>
  __device__ N warp_max(N x) const {
    for (int apart = 16; apart > 0; apart /= 2) {
      const N other = __shfl_xor_sync(kAll, x, apart);
      x = other > x ? other : x;
    }
    return x;
  }
  template <class N>
  __device__ N warp_sum(N x) const {
    for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(kAll, x, apart);
    return x;
  }
  __device__ static void lower_to(std::uint64_t& at, std::uint64_t value) {
    atomicMin(reinterpret_cast<unsigned long long*>(&at), static_cast<unsigned long long>(value));
  }

 private:
  static constexpr unsigned kAll = 0xffffffffu;
};
#endif

}  // namespace gradstep::cuda
