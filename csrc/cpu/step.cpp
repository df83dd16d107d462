#include "step.h"

#include <algorithm>
#include <cmath>

#include "../core/factors.h"
#include "../core/portable.h"
#include "run.h"

namespace gradstep::cpu {
namespace {

double squares_for_clipping(const Settings& settings, const Sums& sums, bool counted) {
  return sums.at[counted && !sums_gradient_apart(settings) ? kCameSquares : kGradSquares];
}

// What LARS and NovoGrad do to the gradient, whose norm is that of what clipping has left.
void adapt(const StepItem& item, double grad_norm, const Sums& sums, Factors& factors) {
  const Settings& settings = *item.settings;
  if (settings.adaptation == Adaptation::kLars) {
    const double factor = lars_factor(settings, std::sqrt(sums.at[kParamSquares]), grad_norm);
    (settings.decay == Decay::kCoupled ? factors.decayed : factors.gradient) *= factor;
  } else if (settings.adaptation == Adaptation::kNovograd) {
    factors.gradient *= novograd_factor(settings, item.moment.step, grad_norm, *item.norm_state);
  }
}

}  // namespace

// The weights of the gradients, with the scale of the settings in them: `n_gradients` for each settings, in the order of items.
void Step::prepare_weights(const std::vector<StepItem>& items, const StepOptions& options) {
  weights_.clear();
  const Settings* last = nullptr;
  for (const StepItem& item : items) {
    if (item.settings == last) continue;
    last = item.settings;
    for (int i = 0; i < options.n_gradients; ++i) weights_.push_back((options.weights ? options.weights[i] : 1) * last->scale);
  }
}

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
  make_pipeline(*item.settings, moment, item.sweep->compute, *item.sweep, purpose, beside, made);
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
  beside.several_gradients = options.weights != nullptr;
  std::size_t weights = 0;
  const Settings* last = nullptr;
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (items[i].settings != last) {
      if (last) weights += static_cast<std::size_t>(options.n_gradients);
      last = items[i].settings;
    }
    if (choose && !choose(items[i])) continue;
    beside.weights = weights_.data() + weights;
    beside.has_factors = options.clip_norm != kNoLimit || items[i].settings->wants_gradient_norms();
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
  prepare_weights(items, options);
  const auto any = [&](auto&& holds) { return std::any_of(items.begin(), items.end(), holds); };

  // The norm of a gradient says whether it is finite, but for squares that are not, and elements that a stage hides.
  const bool clips = options.clip_norm != kNoLimit;
  const bool norms = clips || options.checks || any([](const StepItem& item) { return item.settings->wants_gradient_norms(); });
  const bool counts = options.stats || (options.checks && any([](const StepItem& item) {
                                          return item.sweep->compute == Format::kFloat64 || sums_gradient_apart(*item.settings);
                                        }));
  std::vector<Sums> came, sums;
  if (norms) {
    const Choose some = [](const StepItem& item) { return item.settings->wants_gradient_norms(); };
    sweep(items, options, Purpose::kNorms, counts, clips || options.checks || options.stats ? nullptr : some, &came);
    for (std::size_t i = 0; options.checks && i < items.size() && !outcome.skipped(); ++i) {
      const bool finite = counts ? came[i].at[kNans] + came[i].at[kInfs] == 0 : std::isfinite(came[i].at[kGradSquares]);
      if (!finite) outcome.nonfinite = i;
    }
  }
  if (options.leave_out) outcome.nonfinite = 0;
  if (options.stats) outcome.seen.resize(items.size());
  const auto keep_came = [&] {
    for (std::size_t i = 0; i < outcome.seen.size() && norms; ++i) outcome.seen[i].sums = came[i];
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

  if (norms) {
    double total = 0;
    for (std::size_t i = 0; i < items.size(); ++i) {
      const Settings& settings = *items[i].settings;
      const double squares = squares_for_clipping(settings, came[i], counts);
      double& factor = factors_[i].gradient;
      if (settings.clip_norm != kNoLimit) factor = clip_factor(settings.clip_norm, std::sqrt(squares));
      total += factor * factor * squares;
    }
    if (clips) outcome.clip_factor = clip_factor(options.clip_norm, std::sqrt(total));
    for (std::size_t i = 0; i < items.size(); ++i) {
      factors_[i].gradient *= outcome.clip_factor;
      if (options.stats) outcome.seen[i].clip_factor = factors_[i].gradient;
      const double norm = factors_[i].gradient * std::sqrt(squares_for_clipping(*items[i].settings, came[i], counts));
      adapt(items[i], norm, came[i], factors_[i]);
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
    for (const std::size_t i : chosen_) {
      const Settings& settings = *items[i].settings;
      const double param = std::sqrt(sums[i].at[kParamSquares]), update = std::sqrt(sums[i].at[kUpdateSquares]);
      (settings.cautious ? factors_[i].late_trust : factors_[i].trust) = trust_ratio(settings, param, update);
    }
  }

  sweep(items, options, Purpose::kUpdate, options.stats && !norms, nullptr, options.stats ? &sums : nullptr);
  keep_came();
  for (std::size_t i = 0; i < outcome.seen.size(); ++i) {
    Sums& seen = outcome.seen[i].sums;
    for (const Sum sum : {kParamSquares, kUpdateSquares, kRuleGradSquares}) seen.at[sum] = sums[i].at[sum];
    if (!norms) seen = sums[i];
    const double factor = factors_[i].gradient;
    if (!changes_gradient(*items[i].settings)) seen.at[kRuleGradSquares] = factor * factor * seen.at[kCameSquares];
  }
  return outcome;
}

}  // namespace gradstep::cpu
