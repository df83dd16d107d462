// Running without the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <exception>
#include <thread>

namespace gradstep::python {

// Takes the GIL back. If Python has ended meanwhile it ends this thread (before 3.14), by unwinding it through frames that
// would then let go of Python's objects without the GIL. So the thread is stopped right here, as Python itself does from 3.14
// on.
inline void take_gil_back(PyThreadState* state) {
  try {
    PyEval_RestoreThread(state);
  } catch (...) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

// Calls `function` while other Python threads may run.
template <class Function>
void without_gil(Function function) {
  std::exception_ptr failure;
  PyThreadState* state = PyEval_SaveThread();
  try {
    function();
  } catch (...) {
    failure = std::current_exception();
  }
  take_gil_back(state);
  if (failure) std::rethrow_exception(failure);
}

}  // namespace gradstep::python
