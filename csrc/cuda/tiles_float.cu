#include "tiles_kernel.h"

namespace gradstep::cuda {

template cudaError_t launch_tiles<float>(const Launch&, const Args&, cudaStream_t);
template cudaError_t allow_shared<float>(int);

}  // namespace gradstep::cuda
