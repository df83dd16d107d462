// The GPU's engine on the host, for tests: the same tables, launches and programs. A block of threads is one thread of the
// host, or as many as asked for, in warps of 32.
#pragma once

#include "tables.h"

namespace gradstep::cuda {

// Two devices whose memory is the host's.
device::Driver& emulated_driver();

// What tests set and see.
struct Emulation {
  std::uint32_t threads = 1;     // of a block: 1, or a multiple of 32
  std::vector<Launch> launches;  // since it was emptied
  std::size_t sent = 0;          // bytes of tables
  bool fails = false;            // the launch of a rule
};
Emulation& emulation();

}  // namespace gradstep::cuda
