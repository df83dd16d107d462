#include "tiles_kernel.h"

namespace gradstep::cuda {

template cudaError_t launch_tiles<double>(const Launch&, const Args&, cudaStream_t);
template cudaError_t allow_shared<double>(int);

}  // namespace gradstep::cuda
