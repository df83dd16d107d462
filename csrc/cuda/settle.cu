#include "launch.h"
#include "settle.h"

namespace gradstep::cuda {
namespace {

constexpr std::uint32_t kItemThreads = 64;  // few, so that a model's tensors occupy several processors

__global__ void __launch_bounds__(kItemThreads, 1) prepare_kernel(const __grid_constant__ Args args) {
  prepare(GpuThreads{}, args, blockIdx.x);
}
__global__ void __launch_bounds__(kThreads) groups_kernel(const __grid_constant__ Args args) {
  add_groups(GpuThreads{}, args, blockIdx.x);
}
__global__ void __launch_bounds__(kSettleThreads) settle_kernel(const __grid_constant__ Args args) {
  settle(GpuThreads{}, args);
}
__global__ void __launch_bounds__(kSettleThreads) follow_kernel(const __grid_constant__ Args args) {
  follow(GpuThreads{}, args);
}
__global__ void __launch_bounds__(kSettleThreads) report_kernel(const __grid_constant__ Args args) {
  report(GpuThreads{}, args);
}

struct Payload {
  std::uint64_t words[kPayload / sizeof(std::uint64_t)];
};
// Tables are made of words of eight bytes.
__global__ void __launch_bounds__(kThreads)
    upload_kernel(std::uint64_t* to, std::uint32_t words, const __grid_constant__ Payload payload) {
  for (std::uint32_t i = threadIdx.x; i < words; i += blockDim.x) to[i] = payload.words[i];
}

std::uint32_t blocks_of(std::uint32_t tasks, std::uint32_t threads) { return (tasks + threads - 1) / threads; }

}  // namespace

cudaError_t launch_settle(const Launch& launch, const Args& args, cudaStream_t stream) {
  switch (launch.program) {
    case Program::kPrepare:
      prepare_kernel<<<blocks_of(launch.tasks, kItemThreads), kItemThreads, 0, stream>>>(args);
      break;
    case Program::kGroups:
      groups_kernel<<<blocks_of(launch.tasks, kThreads), kThreads, 0, stream>>>(args);
      break;
    case Program::kSettle:
      settle_kernel<<<1, kSettleThreads, 0, stream>>>(args);
      break;
    case Program::kFollow:
      follow_kernel<<<1, kSettleThreads, 0, stream>>>(args);
      break;
    default:
      report_kernel<<<1, kSettleThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

cudaError_t launch_upload(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  Payload payload;
  std::memcpy(payload.words, from, bytes);
  const auto words = static_cast<std::uint32_t>(bytes / sizeof(std::uint64_t));
  upload_kernel<<<1, kThreads, 0, stream>>>(static_cast<std::uint64_t*>(to), words, payload);
  return cudaGetLastError();
}

}  // namespace gradstep::cuda
