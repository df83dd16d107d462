// The programs that run between sweeps: what the CPU's engine works out on the host (cpu/step.cpp), with the same functions.
#pragma once

#include "tables.h"
#include "threads.h"

namespace gradstep::cuda {

#if defined(__CUDACC__)
#define GRADSTEP_PROGRAM __host__ __device__ __forceinline__
#else
#define GRADSTEP_PROGRAM inline
#endif

// Whether the step is left out.
GRADSTEP_PROGRAM std::uint64_t left_out_for(const Args& args) {
  if (args.settled && args.status->nonfinite != Outcome::kNone) return args.status->nonfinite;
  const bool found = args.found_inf && args.found_inf.get() != 0;
  return found || args.options.leave_out ? 0 : Outcome::kNone;
}

// The settings of an item as they are now.
GRADSTEP_PROGRAM Settings settings_of(const Args& args, const Now& now) {
  Settings settings = args.settings[now.settings];
  if (now.lr) settings.values[0] = now.lr.get();
  if (args.grad_scale) settings.scale = settings.scale / args.grad_scale.get();
  return settings;
}

// The moment of an item: counts are those of the step that is about to be done.
GRADSTEP_PROGRAM Moment moment_of(const Settings& settings, const Now& now) {
  Moment moment = now.moment;
  if (now.numbers.step) moment.step = now.numbers.step.get() + 1;
  moment.first = now.may_be_first && (moment.first || (now.numbers.first_at_1 && moment.step == 1));
  if (now.numbers.ema_count) moment.ema_count = now.numbers.ema_count.get() + 1;
  if (now.numbers.swa_count) moment.swa_count = now.numbers.swa_count.get() + (swa_takes(settings, moment.step) ? 1 : 0);
  return moment;
}

// Moves the numbers beside the states.
GRADSTEP_PROGRAM void commit(const Now& now, const Moment& moment, double norm) {
  if (now.numbers.step) now.numbers.step.set(moment.step);
  if (now.numbers.ema_count) now.numbers.ema_count.set(moment.ema_count);
  if (now.numbers.swa_count) now.numbers.swa_count.set(moment.swa_count);
  if (now.numbers.norm) now.numbers.norm.set(norm);
}

// Makes the pipeline of one item.
template <class Threads>
GRADSTEP_PROGRAM void prepare(const Threads& threads, const Args& args, std::uint32_t block) {
  const std::uint32_t i = block * threads.count() + threads.first();
  if (i >= args.n_items) return;
  const Now& now = args.now[i];
  const Settings settings = settings_of(args, now);
  const Moment moment = moment_of(settings, now);
  args.moments[i] = moment;
  if (args.begins) {
    args.norms[i] = now.numbers.norm ? now.numbers.norm.get() : now.norm;
    args.factors[i] = Factors{};
  }

  Purpose purpose = args.purpose;
  Pipeline& pipeline = args.pipelines[i];
  if (purpose != Purpose::kNorms) {
    const std::uint64_t nonfinite = left_out_for(args);
    const bool skipped = nonfinite != Outcome::kNone;
    if (purpose == Purpose::kUpdate) {
      if (i == 0) {
        args.status->result = nonfinite;
        if (!args.settled) args.status->clip_factor = 1;
      }
      if (!skipped) commit(now, moment, args.norms[i]);
      else if (args.options.stats) purpose = Purpose::kParams;
    }
    const bool is_due = args.only_if_skipped ? skipped : !skipped || purpose == Purpose::kParams;
    if (!is_due) {
      pipeline.size = pipeline.n_passes = 0;
      return;
    }
  }
  const StepOptions& options = args.options;
  Beside beside;
  beside.count_gradient = purpose == Purpose::kNorms ? args.counts : options.stats && !args.settled;
  beside.sum_update = options.stats && purpose == Purpose::kUpdate;
  beside.has_factors = options.clips() || settings.wants_gradient_norms();
  beside.zero_gradient = options.zero_gradient;
  beside.weights = args.weights;
  make_pipeline(settings, moment, args.items[i].sweep, purpose, beside, pipeline);
}

// Adds what stands in slot `slot` of sums [begin, end).
GRADSTEP_PROGRAM double add_slot(const Sums* sums, std::int64_t begin, std::int64_t end, int slot) {
  double total = 0;
  for (std::int64_t i = begin; i < end; ++i) total = Sums::added(slot, total, sums[i].at[slot]);
  return total;
}

// The sums of one group of blocks, a slot a thread. Groups are counted over all items.
template <class Threads>
GRADSTEP_PROGRAM void add_groups(const Threads& threads, const Args& args, std::uint32_t block) {
  const std::uint32_t task = block * threads.count() + threads.first();
  const auto group = task / kSums, slot = task % kSums;
  if (group >= args.n_groups) return;
  std::uint32_t low = 0, high = args.n_items;  // the last item whose groups begin at this one or before
  while (high - low > 1) {
    const std::uint32_t middle = low + (high - low) / 2;
    (args.items[middle].first_group <= group ? low : high) = middle;
  }
  const Item& item = args.items[low];
  const std::int64_t first = std::int64_t{group - item.first_group} * kBlocksTogether, n = item.sweep.n_blocks();
  const std::int64_t end = first + kBlocksTogether < n ? first + kBlocksTogether : n;
  args.groups[group].at[slot] = add_slot(args.blocks + item.first_block, first, end, static_cast<int>(slot));
}

// The sums of all items, into `to`.
template <class Threads>
GRADSTEP_PROGRAM void add_items(const Threads& threads, const Args& args, Sums* to) {
  for (std::uint32_t task = threads.first(); task < args.n_items * kSums; task += threads.count()) {
    const Item& item = args.items[task / kSums];
    const int slot = static_cast<int>(task % kSums);
    to[task / kSums].at[slot] = add_slot(args.groups, item.first_group, item.first_group + n_groups(item.sweep), slot);
  }
  threads.sync();
}

// What follows from the sums over the gradients: whether to leave the step out, and the factors of clipping. One block.
template <class Threads>
GRADSTEP_PROGRAM void settle(const Threads& threads, const Args& args) {
  if (threads.first() == 0) *args.status = Status{};
  add_items(threads, args, args.came);
  const auto for_items = [&](auto each) {
    for (std::uint32_t i = threads.first(); i < args.n_items; i += threads.count()) {
      each(i, args.settings[args.now[i].settings], args.came[i]);
    }
    threads.sync();
  };
  for_items([&](std::uint32_t i, const Settings& settings, Sums& came) {
    const bool summed = args.sums_all || settings.wants_gradient_norms();
    if (!summed) came = Sums{};
    if (args.options.checks && !is_finite(came, args.counts)) threads.lower_to(args.status->nonfinite, i);
    const double squares = squares_for_clipping(settings, came, args.counts);
    const double factor = tensor_clip_factor(settings, squares);
    args.factors[i].gradient = factor;
    args.terms[i] = factor * factor * squares;
  });
  if (threads.first() == 0 && args.options.clips()) {
    double total = 0;
    for (std::uint32_t i = 0; i < args.n_items; ++i) total += args.terms[i];
    args.status->clip_factor = clip_factor(args.options.clip_norm, square_root(total));
  }
  threads.sync();
  for_items([&](std::uint32_t i, const Settings& settings, const Sums& came) {
    Factors& factors = args.factors[i];
    factors.gradient *= args.status->clip_factor;
    args.seen[i].clip_factor = factors.gradient;
    adapt(settings, args.moments[i].step, came, args.counts, args.norms[i], factors);
  });
}

// What follows from the sums over the updates: factors of `cautious`, trust ratios. One block.
template <class Threads>
GRADSTEP_PROGRAM void follow(const Threads& threads, const Args& args) {
  add_items(threads, args, args.sums);
  for (std::uint32_t i = threads.first(); i < args.n_items; i += threads.count()) {
    const Settings settings = settings_of(args, args.now[i]);
    if (args.purpose == Purpose::kAgreement && settings.cautious) {
      args.factors[i].cautious = cautious_factor(args.items[i].sweep.size, args.sums[i].at[kAgreeing]);
    }
    if (args.purpose == Purpose::kTrust && settings.trust_ratio) set_trust(settings, args.sums[i], args.factors[i]);
  }
}

// The statistics of each item. One block.
template <class Threads>
GRADSTEP_PROGRAM void report(const Threads& threads, const Args& args) {
  add_items(threads, args, args.sums);
  for (std::uint32_t i = threads.first(); i < args.n_items; i += threads.count()) {
    Seen& seen = args.seen[i];
    if (!args.settled) seen.clip_factor = 1;
    const Sums* came = args.settled ? args.came + i : nullptr;
    if (args.status->result != Outcome::kNone) {
      seen.sums = came ? *came : Sums{};
      seen.sums.at[kParamSquares] = args.sums[i].at[kParamSquares];
      seen.clip_factor = 1;
    } else {
      const Settings& settings = args.settings[args.now[i].settings];
      seen.sums = seen_sums(settings, came, args.sums[i], args.factors[i].gradient);
    }
  }
}

}  // namespace gradstep::cuda
