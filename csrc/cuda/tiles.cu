#include "launch.h"
#include "tiles.h"

namespace gradstep::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1) tiles_kernel(const __grid_constant__ Args args) {
  carry_tiles<T>(GpuThreads{}, args, blockIdx.x);
}

}  // namespace

cudaError_t launch_tiles(const Launch& launch, const Args& args, cudaStream_t stream) {
  if (launch.compute == Format::kFloat32) tiles_kernel<float><<<launch.tasks, kThreads, launch.shared, stream>>>(args);
  else tiles_kernel<double><<<launch.tasks, kThreads, launch.shared, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t allow_shared(int bytes) {
  const cudaError_t error = cudaFuncSetAttribute(tiles_kernel<float>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(tiles_kernel<double>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace gradstep::cuda
