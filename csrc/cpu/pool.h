// The thread pool, behind one function.
#pragma once

#include <cstdint>

namespace gradstep::cpu {

// How many threads a large sweep may use, the caller's included.
int num_threads();
void set_num_threads(int n);

// Runs large sweeps on the OpenMP threads of another library of this process from now on, by its `GOMP_parallel`; null: on the
// pool's own. GNU's OpenMP threads go on spinning for milliseconds after each parallel operation, and beside them a thread of
// ours would get half a processor: on two cores a step right after an operation of torch takes up to twice the time. Handed the
// same threads, the step starts at once.
using OpenMpParallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
void set_openmp(OpenMpParallel parallel);

// Calls task(context, i) once for each i in [0, n), on up to num_threads() threads, and returns when all calls have returned.
//
// The caller takes part. Threads start with the first call that needs them. A call that finds the pool busy (another thread's
// sweep, or one from inside a task) runs alone on its own thread. A forked child starts with a fresh pool of our own: GNU's
// OpenMP hangs there.
void parallel_for(std::int64_t n, void (*task)(void* context, std::int64_t i), void* context);

}  // namespace gradstep::cpu
