// GPUs, by CUDA's runtime.
#pragma once

#include "../core/engine.h"

namespace gradstep::cuda {

// Nothing is asked of CUDA before the first call of one of its functions.
device::Driver& driver();

}  // namespace gradstep::cuda
