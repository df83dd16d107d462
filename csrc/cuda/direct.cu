#include "direct.h"
#include "launch.h"

namespace gradstep::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) sums_kernel(const __grid_constant__ Args args) {
  sum_gradient<T>(GpuThreads{}, args, blockIdx.x);
}

template <class Rule, class T, Stored kStored>
__global__ void __launch_bounds__(kThreads) update_kernel(const __grid_constant__ Args args) {
  update_directly<Rule, T, kStored>(GpuThreads{}, args, blockIdx.x);
}

template <class T>
void launch_of(const Launch& launch, const Args& args, cudaStream_t stream) {
  if (launch.program == Program::kSums) {
    sums_kernel<T><<<launch.tasks, kThreads, launch.shared, stream>>>(args);
    return;
  }
  visit_at(Rules{}, launch.rule, [&]<class Rule>() {
    if (launch.stored == Stored::kInPlace) {
      update_kernel<Rule, T, Stored::kInPlace><<<launch.tasks, kThreads, 0, stream>>>(args);
    } else {
      update_kernel<Rule, T, Stored::kMixed><<<launch.tasks, kThreads, 0, stream>>>(args);
    }
  });
}

}  // namespace

cudaError_t launch_direct(const Launch& launch, const Args& args, cudaStream_t stream) {
  if (launch.compute == Format::kFloat32) launch_of<float>(launch, args, stream);
  else launch_of<double>(launch, args, stream);
  return cudaGetLastError();
}

}  // namespace gradstep::cuda
