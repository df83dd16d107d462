// A step of a list of tensors: the sweeps that it takes, and what is worked out between them.
//
//   sums over the gradients -> factors of clipping, whether to skip -> sums over the updates -> trust ratios -> the update
//
// Most steps need no sums and are one sweep. Sweeps before the last read and write nothing, so a step can be left out until
// then.
#pragma once

#include <deque>
#include <vector>

#include "../core/norms.h"
#include "pipeline.h"

namespace gradstep::cpu {

struct StepItem {
  const Sweep* sweep;
  const Settings* settings;
  Moment moment;
  double* norm_state = nullptr;  // NovoGrad's second moment, which the step moves
};

struct StepOptions {
  double clip_norm = kNoLimit;         // over all tensors
  bool checks = false;                 // leave the step out if a gradient has an element that is not finite
  bool leave_out = false;              // leave it out whatever the gradients are
  bool stats = false;
  bool zero_gradient = false;
  bool zero_skipped = false;           // also where the step is left out
  const double* weights = nullptr;     // of several gradients
  int n_gradients = 1;
};

// What a step saw of one tensor.
struct Seen {
  Sums sums;
  double clip_factor = 1;  // of this tensor's norm and the overall one
};

struct Outcome {
  static constexpr std::size_t kNone = static_cast<std::size_t>(-1);
  std::size_t nonfinite = kNone;  // the first item for which the step was left out
  double clip_factor = 1;         // of the overall norm
  std::vector<Seen> seen;         // one an item, with `stats`

  bool skipped() const { return nonfinite != kNone; }
};

class Step {
 public:
  // Carries the step out. Norm states move; counts are the caller's.
  Outcome run(std::vector<StepItem>& items, const StepOptions& options);

 private:
  // The pipeline that was made last for a group of tensors.
  struct Latest {
    const Settings* settings;
    Moment moment;
    std::uint64_t kind;
    const Pipeline* pipeline;
  };
  using Choose = bool (*)(const StepItem&);

  void prepare_weights(const std::vector<StepItem>& items, const StepOptions& options);
  void sweep(const std::vector<StepItem>& items, const StepOptions& options, Purpose purpose, bool stats, Choose choose,
             std::vector<Sums>* sums);
  const Pipeline& pipeline(const StepItem& item, Purpose purpose, const Beside& beside);

  std::vector<Factors> factors_;     // one an item
  std::vector<Work> works_;
  std::vector<std::size_t> chosen_;  // the works' items
  std::vector<Sums> blocks_;
  std::vector<double> weights_;
  std::vector<Latest> latest_;
  std::deque<Pipeline> pipelines_;
  std::size_t pipelines_used_ = 0;
};

}  // namespace gradstep::cpu
