// From settings to the operations and constants of one step.
#pragma once

#include "../core/settings.h"
#include "kernels.h"

namespace gradstep::cpu {

// What a sweep is for. All but the last two write nothing.
enum class Purpose {
  kNorms,      // sums over the gradient
  kAgreement,  // counts where update and gradient agree
  kTrust,      // sums over the update
  kParams,     // sums over the parameter
  kUpdate,
  kZero,       // the gradient alone
};

// What a pipeline shall do beside.
struct Beside {
  bool count_gradient = false;      // gather the statistics of the gradient as it came
  bool sum_update = false;          // and those of the update
  bool has_factors = false;         // the tensors' gradient factors may differ from 1
  bool zero_gradient = false;
  bool several_gradients = false;
  const double* weights = nullptr;  // of the gradients, one or several; the settings' scale is in them
};

// Fills the pipeline of one tensor's step, with the loops of the instruction set in use.
void make_pipeline(const Settings& settings, const Moment& moment, Format compute, const Sweep& sweep, Purpose purpose,
                   const Beside& beside, Pipeline& pipeline);

// Fills a pipeline of one loop that needs no constants. `loads`, `stores`: operands, a bit each.
void make_loop_pipeline(Loop loop, std::uint32_t loads, std::uint32_t stores, Format compute, Pipeline& pipeline);

// Fills the pipeline that touches a parameter, its gradient and `states` states without any math.
void make_touch_pipeline(int states, Format compute, Pipeline& pipeline);

}  // namespace gradstep::cpu
