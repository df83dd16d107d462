// The CPU engine: cuts sweeps into chunks at fixed places and runs them on the pool.
#pragma once

#include <vector>

#include "../core/norms.h"
#include "../core/sweep.h"

namespace gradstep::cpu {

// Whether kernels flush denormals (numbers under 1.2e-38 in float32) to zero. The caller's own floating-point state is never
// changed.
bool flush_denormals();
void set_flush_denormals(bool flush);

// Runs every sweep to its end.
void run(const std::vector<Work>& works, bool keeps_denormals = false);

// The same, with sums: returns those of each work. `blocks` is scratch, and the works point into it meanwhile.
std::vector<Sums> run_and_sum(std::vector<Work>& works, std::vector<Sums>& blocks);

}  // namespace gradstep::cpu
