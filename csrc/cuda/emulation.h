// The GPU's engine on the host, for tests: the same tables, launches and programs, with one thread in the place of each block.
#pragma once

#include "../core/engine.h"

namespace gradstep::cuda {

// Two devices whose memory is the host's.
device::Driver& emulated_driver();

}  // namespace gradstep::cuda
