// The kernel of kTiles. Each compute type has a file of its own, so that they are compiled side by side.
#pragma once

#include "launch.h"
#include "tiles.h"

namespace gradstep::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == sizeof(float) ? 2 : 1)
    tiles_kernel(const __grid_constant__ Args args) {
  carry_tiles<T>(GpuThreads{}, args, blockIdx.x);
}

template <class T>
cudaError_t launch_tiles(const Launch& launch, const Args& args, cudaStream_t stream) {
  tiles_kernel<T><<<launch.tasks, kThreads, launch.shared, stream>>>(args);
  return cudaGetLastError();
}

template <class T>
cudaError_t allow_shared(int bytes) {
  return cudaFuncSetAttribute(tiles_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace gradstep::cuda
