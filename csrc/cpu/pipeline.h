// From settings to the operations and constants of one step.
#pragma once

#include <vector>

#include "../core/stages.h"
#include "../core/sweep.h"

namespace gradstep::cpu {

// A rule with its settings and the stages around it, as numbers: the same for every tensor of a group.
struct Settings {
  int rule = 0;                         // index in the registry
  std::vector<double> values;           // in the order of the rule's fields
  struct Stage {
    int stage;                          // index in GradientStages
    std::vector<double> values;
  };
  std::vector<Stage> stages;            // in the order in which the gradient passes them
  Decay decay = Decay::kNone;
  double weight_decay = 0;
};

// Fills the pipeline of step `step` (counted from 1) for tensors computed in `compute`, with the loops of the instruction set
// in use. `first`: the states hold nothing yet.
void make_pipeline(const Settings& settings, double step, bool first, Format compute, Pipeline& pipeline);

// Fills the pipeline that touches a parameter, its gradient and `states` states without any math.
void make_touch_pipeline(int states, Format compute, Pipeline& pipeline);

}  // namespace gradstep::cpu
