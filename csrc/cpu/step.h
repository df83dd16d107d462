// The CPU's engine: the steps of a list of tensors.
#pragma once

#include <deque>
#include <vector>

#include "../core/engine.h"

namespace gradstep::cpu {

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

  void sweep(const std::vector<StepItem>& items, const StepOptions& options, Purpose purpose, bool stats, Choose choose,
             std::vector<Sums>* sums);
  const Pipeline& pipeline(const StepItem& item, Purpose purpose, const Beside& beside);

  std::vector<Factors> factors_;     // one an item
  std::vector<Work> works_;
  std::vector<std::size_t> chosen_;  // the works' items
  std::vector<Sums> blocks_;
  std::vector<Latest> latest_;
  std::deque<Pipeline> pipelines_;
  std::size_t pipelines_used_ = 0;
};

}  // namespace gradstep::cpu
