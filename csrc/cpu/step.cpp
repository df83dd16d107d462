#include "step.h"

#include <algorithm>

#include "../core/portable.h"
#include "run.h"

namespace gradstep::cpu {
const Pipeline& Step::pipeline(const StepItem& item, Purpose purpose, const Beside& beside) {
  Moment moment = item.moment;
  if (item.settings->noise == 0) moment.position = 0;
  for (const Latest& latest : latest_) {
    if (latest.settings == item.settings && latest.moment == moment && latest.kind == item.sweep->kind) {
      return *latest.pipeline;
    }
  }
  if (pipelines_used_ == pipelines_.size()) pipelines_.emplace_back();
  Pipeline& made = pipelines_[pipelines_used_++];
  make_pipeline(*item.settings, moment, *item.sweep, purpose, beside, made);
  // A few of the latest will do: most tensors share settings and step with the ones before.
  const Latest now{item.settings, moment, item.sweep->kind, &made};
  if (latest_.size() < 4) latest_.insert(latest_.begin(), now);
  else latest_[pipelines_used_ % 4] = now;
  return made;
}

// One sweep over the chosen items. `sums`, if there are to be any, gets those of each.
void Step::sweep(const std::vector<StepItem>& items, const StepOptions& options, Purpose purpose, bool stats, Choose choose,
                 std::vector<Sums>* sums) {
  pipelines_used_ = 0;
  works_.clear();
  chosen_.clear();
  latest_.clear();
  Beside beside;
  beside.count_gradient = stats && (purpose == Purpose::kNorms || purpose == Purpose::kUpdate);
  beside.sum_update = options.stats && purpose == Purpose::kUpdate;
  beside.zero_gradient = options.zero_gradient;
  beside.weights = options.weights;
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (choose && !choose(items[i])) continue;
    beside.has_factors = options.clips() || items[i].settings->wants_gradient_norms();
    const Moment& moment = items[i].moment;
    works_.push_back({items[i].sweep, &pipeline(items[i], purpose, beside), factors_[i], nullptr,
                      static_cast<std::uint32_t>(moment.position),
                      static_cast<std::uint32_t>(static_cast<std::uint64_t>(moment.step))});
    chosen_.push_back(i);
  }
  if (!sums) return cpu::run(works_);

  const std::vector<Sums> found = cpu::run_and_sum(works_, blocks_);
  sums->assign(items.size(), {});
  for (std::size_t w = 0; w < works_.size(); ++w) (*sums)[chosen_[w]] = found[w];
}

Outcome Step::run(std::vector<StepItem>& items, const StepOptions& options) {
  Outcome outcome;
  const FloatEnvironment environment(false);  // constants are rounded to nearest, whatever the caller's mode
  factors_.assign(items.size(), {});
  const auto any = [&](auto&& holds) { return std::any_of(items.begin(), items.end(), holds); };

  Needs needs;
  for (const StepItem& item : items) needs.add(options, *item.settings, item.sweep->compute);
  std::vector<Sums> came, sums;
  if (needs.norms) {
    const Choose some = [](const StepItem& item) { return item.settings->wants_gradient_norms(); };
    sweep(items, options, Purpose::kNorms, needs.counts, needs.all ? nullptr : some, &came);
    for (std::size_t i = 0; options.checks && i < items.size() && !outcome.skipped(); ++i) {
      if (!is_finite(came[i], needs.counts)) outcome.nonfinite = i;
    }
  }
  if (options.leave_out) outcome.nonfinite = 0;
  if (options.stats) outcome.seen.resize(items.size());
  const auto keep_came = [&] {
    for (std::size_t i = 0; i < outcome.seen.size() && needs.norms; ++i) outcome.seen[i].sums = came[i];
  };
  if (outcome.skipped()) {
    if (options.zero_skipped) sweep(items, options, Purpose::kZero, false, nullptr, nullptr);
    keep_came();
    if (options.stats) {
      sweep(items, options, Purpose::kParams, false, nullptr, &sums);
      for (std::size_t i = 0; i < items.size(); ++i) outcome.seen[i].sums.at[kParamSquares] = sums[i].at[kParamSquares];
    }
    return outcome;
  }

  if (needs.norms) {
    double total = 0;
    for (std::size_t i = 0; i < items.size(); ++i) {
      const double squares = squares_for_clipping(*items[i].settings, came[i], needs.counts);
      double& factor = factors_[i].gradient;
      factor = tensor_clip_factor(*items[i].settings, squares);
      total += factor * factor * squares;
    }
    if (options.clips()) outcome.clip_factor = clip_factor(options.clip_norm, square_root(total));
    for (std::size_t i = 0; i < items.size(); ++i) {
      factors_[i].gradient *= outcome.clip_factor;
      if (options.stats) outcome.seen[i].clip_factor = factors_[i].gradient;
      adapt(*items[i].settings, items[i].moment.step, came[i], needs.counts, *items[i].norm_state, factors_[i]);
    }
  }
  const Choose is_cautious = [](const StepItem& item) { return item.settings->cautious; };
  if (any([&](const StepItem& item) { return is_cautious(item); })) {
    sweep(items, options, Purpose::kAgreement, false, is_cautious, &sums);
    for (const std::size_t i : chosen_) factors_[i].cautious = cautious_factor(items[i].sweep->size, sums[i].at[kAgreeing]);
  }
  const Choose is_trusted = [](const StepItem& item) { return item.settings->trust_ratio; };
  if (any([&](const StepItem& item) { return is_trusted(item); })) {
    sweep(items, options, Purpose::kTrust, false, is_trusted, &sums);
    for (const std::size_t i : chosen_) set_trust(*items[i].settings, sums[i], factors_[i]);
  }

  sweep(items, options, Purpose::kUpdate, options.stats && !needs.norms, nullptr, options.stats ? &sums : nullptr);
  for (std::size_t i = 0; i < outcome.seen.size(); ++i) {
    outcome.seen[i].sums = seen_sums(*items[i].settings, needs.norms ? &came[i] : nullptr, sums[i], factors_[i].gradient);
  }
  return outcome;
}

}  // namespace gradstep::cpu
