// The launches of the programs on a GPU. Each file of kernels has one of these.
#pragma once

#include <cuda_runtime_api.h>

#include "tables.h"

namespace gradstep::cuda {

// kPrepare, kGroups, kSettle, kFollow, kReport.
cudaError_t launch_settle(const Launch& launch, const Args& args, cudaStream_t stream);

// kSums, kUpdate.
cudaError_t launch_direct(const Launch& launch, const Args& args, cudaStream_t stream);

// kTiles, for float and double; and the largest amount of shared memory that it may be given.
template <class T>
cudaError_t launch_tiles(const Launch& launch, const Args& args, cudaStream_t stream);
template <class T>
cudaError_t allow_shared(int bytes);

// Copies `bytes` bytes, at most kPayload, that travel as an argument of the launch: no memory of the host has to live on.
inline constexpr std::size_t kPayload = 16384;
cudaError_t launch_upload(void* to, const void* from, std::size_t bytes, cudaStream_t stream);

}  // namespace gradstep::cuda
