// From settings to the operations of one tensor's step, in the order in which the data flows: docs/stages.md. An engine looks
// up its loops for them.
#pragma once

#include <new>

#include "../registry.h"
#include "factors.h"

namespace gradstep {

// Loops over a tile. Those of one stage or rule have an index; constants are noted.
enum class Loop : std::uint8_t {
  kUpdate,  // rule: straight to the parameter: gradient factors, coupled decay, rule, decoupled decay, subtraction. Decayed
  kDirection,  // rule: to the tile's update: the rule, decoupled decay if it is to be there, trust factor.             Decayed
  // gradient
  kGradientStage,  // stage
  kFactors,  // scratch <- gradient_factor (scale g), both taken off the tile then
  kScaleRow,  // g <- the row's factor g
  kCentralize,  // g <- g - the row's mean
  kNoise,  // g <- g + sigma z                     NoiseConstants
  kCouple,  // g <- decayed_factor (g + wd p)       CoupledDecay::Op
  // update
  kCautious,
  kDecay,  // u <- decay p + u                     DecoupledDecay::Op
  kTrust,
  kApply,  // p <- p - u
  // parameter
  kParamStage,  // stage
  kScaleParamRow,  // p <- the row's factor p
  kEma,  // a <- a + w (p - a)                   double weight
  kSwa,
  kLookahead,  // s <- s + w (p - s), p <- s           double weight
  // arrays alone
  kScale,  // p <- gradient_factor p
  kSwap,  // p <-> the first state
  kCopyTo,  // the first state <- p
  kCopyFrom,  // p <- the first state
  kTouch,  // number of states: for benchmarks     a zero
  // sums
  kSumGrad,  // squares of scale g
  kSumParam,
  kCountGrad,  // squares, NaN, infinite, zero, largest of scale g
  kSumRuleGrad,  // squares of g, as the rule gets it
  kSumUpdate,  // squares of u and p
  kCountAgreeing,
  kSumRow,  // by row: elements of g
  kSumRowSquares,  // squares of g and p
  kSumParamRow,  // squares of p
  kLoops
};

struct Operation {
  Loop loop;
  std::uint8_t index = 0;  // of a rule, of a stage in its list
  Decay decay = Decay::kNone;
  bool first = false;  // the rule's `First`
  bool dry = false;  // the states stay as they are
};

// The constants of an update: the rule's, then the decay's.
template <class Update, class DecayOp>
struct Decayed {
  Update update;
  DecayOp decay;
};

struct NoiseConstants {
  double sigma;
  std::uint64_t seed;
  std::uint32_t stream, step;
};

// A pass over a tile or a row: operations [begin, end) of the pipeline, then what they found out about the row.
struct Pass {
  int begin = 0, end = 0;
  std::uint32_t loads = 0, stores = 0;  // operands, a bit each
  RowResult finish = RowResult::kNone;
  int finish_constants = 0;  // the operation whose constants `finish` gets
};

// The operations of one step with their constants. A pipeline has one pass, and more only where something depends on a whole
// row: then all of them go over one row, or a few short ones, before the next, while it is in the caches.
struct Pipeline {
  static constexpr int kMaxOperations = 32, kMaxPasses = 4;
  static constexpr std::size_t kConstantBytes = 96;

  Operation operations[kMaxOperations];
  alignas(16) std::byte constants[kMaxOperations][kConstantBytes];
  Pass passes[kMaxPasses];
  int size = 0, n_passes = 0;
  double scale = 1;  // of the gradient
  bool weighs = false;  // the gradient is made in the scratch: the sum of weight_scale weights[i] g_i
  double weight_scale = 1;
  const double* weights = nullptr;  // null: one gradient, of weight 1
  bool in_tiles = false;  // an operation needs a tile's scratch, or finds the tile in the caches
  bool by_row = false;
  bool zeroes_gradient = false;
  Precision precision = Precision::kNearest;  // of the parameter, if it has 16 bits
  bool states_by_chance = false;  // states and averages of 16 bits or less are rounded up or down at random
  std::uint64_t seed = 0;
};

// What a sweep is for. All but the last two write nothing.
enum class Purpose : std::uint8_t {
  kNorms,  // sums over the gradient
  kAgreement,  // counts where update and gradient agree
  kTrust,  // sums over the update
  kParams,  // sums over the parameter
  kUpdate,
  kZero,  // the gradient alone
};

// What a pipeline shall do beside.
struct Beside {
  bool count_gradient = false;  // gather the statistics of the gradient as it came
  bool sum_update = false;  // and those of the update
  bool has_factors = false;  // the tensors' gradient factors may differ from 1
  bool zero_gradient = false;
  const double* weights = nullptr;  // of several gradients
};

// Calls visit.operator()<X>() for the X at `index` in a list.
template <class... Xs, class Visit>
GRADSTEP_HD void visit_at(List<Xs...>, int index, Visit visit) {
  int at = 0;
  ((at++ == index ? visit.template operator()<Xs>() : void()), ...);
}

// Fills the pipeline of one tensor's step. Constants are of the type that it computes in.
template <class T>
class PipelineBuilder {
 public:
  GRADSTEP_DEVICE_TOO PipelineBuilder(const Settings& settings, const Moment& moment, const Sweep& sweep, Purpose purpose,
                                      const Beside& beside, Pipeline& pipeline)
      : settings_(settings), moment_(moment), sweep_(sweep), purpose_(purpose), beside_(beside), pipeline_(pipeline) {
    // Emptied piece by piece: the constants need not be.
    pipeline.size = pipeline.n_passes = 0;
    pipeline.scale = settings.scale;
    pipeline.weighs = false;
    pipeline.by_row = sweep.row > 0;
    pipeline.zeroes_gradient = purpose == Purpose::kZero || (purpose == Purpose::kUpdate && beside.zero_gradient);
    pipeline.in_tiles = pipeline.by_row || pipeline.zeroes_gradient;
    pipeline.precision = is_half(sweep.operands[0].format) ? settings.precision : Precision::kNearest;
    pipeline.states_by_chance = settings.states_by_chance;
    pipeline.seed = static_cast<std::uint64_t>(settings.seed);
  }

  GRADSTEP_DEVICE_TOO void build() {
    const bool agc = settings_.agc != kNoLimit;
    const bool centralize = settings_.centralize && moment_.has_rows && purpose_ != Purpose::kNorms;
    const bool noise = settings_.noise > 0;
    if (purpose_ == Purpose::kZero) return end_pass(0, 0);
    if (purpose_ == Purpose::kParams) {
      add(Loop::kSumParam);
      return end_pass(1, 0);
    }

    // The gradient is prepared in the scratch if anything but a factor changes it.
    if (beside_.weights || !settings_.gradient_stages.empty() || agc || centralize) {
      pipeline_.weighs = pipeline_.in_tiles = true;
      pipeline_.weights = beside_.weights;
      pipeline_.weight_scale = settings_.scale;
      pipeline_.scale = 1;
    }
    if (agc || centralize) {
      add_gradient_stages(false);
      const int constants = pipeline_.size;
      construct(GradientRow{settings_.agc, settings_.agc_eps});
      if (agc) add(Loop::kSumRowSquares);
      if (centralize) add(Loop::kSumRow);
      end_pass(reads(), 0, RowResult::kGradient, constants);
    }
    if (purpose_ == Purpose::kNorms) {
      add_gradient_stages(beside_.count_gradient);
      if (agc) add(Loop::kScaleRow);
      if (!beside_.count_gradient || sums_gradient_apart(settings_)) add(Loop::kSumGrad);
      if (settings_.adaptation == Adaptation::kLars) add(Loop::kSumParam);
      end_pass(3, 0);
      return;
    }

    add_gradient_stages(beside_.count_gradient && purpose_ == Purpose::kUpdate);
    if (agc) add(Loop::kScaleRow);
    if (centralize || noise) multiply_factors();
    if (centralize) add(Loop::kCentralize);
    if (noise) add_noise();

    const bool decay_beside = settings_.trust_ratio && !settings_.decay_in_ratio && settings_.decay == Decay::kDecoupled;
    const bool apart = purpose_ != Purpose::kUpdate || beside_.sum_update || settings_.cautious || decay_beside;
    if (apart) {
      add_update_apart();
      if (purpose_ != Purpose::kUpdate) return end_pass(reads(), 0);
    } else {
      add_rule(Loop::kUpdate, settings_.decay, false);
    }
    add_param_stages();
  }

 private:
  // Sets the constants of the operation that is added next.
  template <class Constants>
  GRADSTEP_HD void construct(const Constants& values) {
    static_assert(sizeof(Constants) <= Pipeline::kConstantBytes);
    ::new (static_cast<void*>(pipeline_.constants[pipeline_.size])) Constants(values);
  }
  GRADSTEP_HD void add(const Operation& operation) { pipeline_.operations[pipeline_.size++] = operation; }
  GRADSTEP_HD void add(Loop loop) { add(Operation{loop}); }
  template <class Constants>
  GRADSTEP_HD void add(Loop loop, const Constants& values) {
    construct(values);
    add(loop);
  }

  GRADSTEP_HD void end_pass(std::uint32_t loads, std::uint32_t stores, RowResult finish = RowResult::kNone,
                            int finish_constants = 0) {
    const int begin = pipeline_.n_passes == 0 ? 0 : pipeline_.passes[pipeline_.n_passes - 1].end;
    pipeline_.passes[pipeline_.n_passes++] = {begin, pipeline_.size, loads, stores, finish, finish_constants};
  }

  // Parameter, gradient and states; all but the gradient.
  GRADSTEP_HD std::uint32_t reads() const { return (1u << (2 + sweep_.n_states)) - 1; }
  GRADSTEP_HD std::uint32_t writes() const { return reads() & ~2u; }

  GRADSTEP_HD std::uint32_t extra_bits() const {
    std::uint32_t bits = 0;
    int k = 2 + sweep_.n_states;
    for (int extra = 0; extra < kMaxExtras; ++extra) {
      if (!(sweep_.extras >> extra & 1)) continue;
      if (moves(static_cast<Extra>(extra))) bits |= 1u << k;
      ++k;
    }
    return bits;
  }

  // Whether this step changes an extra.
  GRADSTEP_HD bool moves(Extra extra) const {
    if (extra == kSlow) return lookahead_moves(settings_, moment_.step);
    return extra == kSwa ? swa_takes(settings_, moment_.step) : settings_.has(kEma);
  }

  // The rule's loop next to one of the decays.
  GRADSTEP_DEVICE_TOO void add_rule(Loop loop, Decay decay, bool dry) {
    visit_at(Rules{}, settings_.rule, [&]<class Rule>() {
      visit_at(Decays{}, static_cast<int>(decay), [&]<class Stage>() {
        using Update = typename Rule::template Update<T>;
        using Op = typename Stage::template Op<T>;
        construct(Decayed<Update, Op>{Update(from_values<Rule>(settings_.values), moment_.step), decay_op<Stage>()});
      });
    });
    add(Operation{loop, static_cast<std::uint8_t>(settings_.rule), decay, moment_.first, dry});
  }

  template <class Stage>
  GRADSTEP_HD typename Stage::template Op<T> decay_op() const {
    return {Stage{settings_.weight_decay}, decay_rate(settings_)};
  }

  GRADSTEP_DEVICE_TOO void add_gradient_stages(bool count) {
    if (count) {
      pipeline_.in_tiles = true;
      add(Loop::kCountGrad);
    }
    for (const auto& stage : settings_.gradient_stages) {
      visit_at(GradientStages{}, stage.stage,
               [&]<class Stage>() { construct(typename Stage::template Op<T>(from_values<Stage>(stage.values))); });
      add(Operation{Loop::kGradientStage, static_cast<std::uint8_t>(stage.stage)});
    }
  }

  GRADSTEP_HD void multiply_factors() {
    pipeline_.in_tiles = multiplied_ = true;
    add(Loop::kFactors);
  }

  GRADSTEP_DEVICE_TOO void add_noise() {
    const double sigma = noise_sigma(settings_, moment_.step);
    const auto step = static_cast<std::uint64_t>(moment_.step);
    add(Loop::kNoise, NoiseConstants{sigma, static_cast<std::uint64_t>(settings_.seed),
                                     static_cast<std::uint32_t>(moment_.position), static_cast<std::uint32_t>(step)});
  }

  // Gradient, update and parameter one after another, with what looks at the update in between.
  GRADSTEP_DEVICE_TOO void add_update_apart() {
    const bool update = purpose_ == Purpose::kUpdate;
    pipeline_.in_tiles = true;
    if (!multiplied_ && (beside_.has_factors || pipeline_.scale != 1)) multiply_factors();
    if (update && beside_.sum_update && changes_gradient(settings_)) add(Loop::kSumRuleGrad);
    if (settings_.decay == Decay::kCoupled) add(Loop::kCouple, decay_op<CoupledDecay>());
    // Decay and trust factor come along with the rule, unless something has to see the update before.
    const bool agreement = purpose_ == Purpose::kAgreement, decays = settings_.decay == Decay::kDecoupled;
    const bool beside = decays && (settings_.cautious || (settings_.trust_ratio && !settings_.decay_in_ratio));
    const bool with_decay = decays && !beside && !agreement;
    add_rule(Loop::kDirection, with_decay ? Decay::kDecoupled : Decay::kNone, !update);
    if (agreement) return add(Loop::kCountAgreeing);
    if (settings_.cautious) add(Loop::kCautious);
    if (beside && settings_.decay_in_ratio) add(Loop::kDecay, decay_op<DecoupledDecay>());
    if (purpose_ == Purpose::kTrust) return add(Loop::kSumUpdate);
    if (settings_.trust_ratio && settings_.cautious) add(Loop::kTrust);
    if (beside && !settings_.decay_in_ratio) add(Loop::kDecay, decay_op<DecoupledDecay>());
    if (beside_.sum_update) add(Loop::kSumUpdate);
    add(Loop::kApply);
  }

  GRADSTEP_DEVICE_TOO void add_param_stages() {
    for (const auto& stage : settings_.param_stages) {
      pipeline_.in_tiles = true;
      visit_at(ParamStages{}, stage.stage, [&]<class Stage>() {
        construct(typename Stage::template Op<T>(from_values<Stage>(stage.values), settings_.lr()));
      });
      add(Operation{Loop::kParamStage, static_cast<std::uint8_t>(stage.stage)});
    }
    std::uint32_t loads = reads(), stores = writes();
    const auto project = [&](const auto& row, RowResult result) {
      const int at = pipeline_.size;
      add(Loop::kSumParamRow, row);
      end_pass(loads, stores, result, at);
      loads = stores = 1;
      add(Loop::kScaleParamRow);
    };
    if (moment_.has_rows && settings_.group_lasso > 0) {
      project(GroupLasso{settings_.lr() * settings_.group_lasso}, RowResult::kGroupLasso);
    }
    if (moment_.has_rows && settings_.max_norm != kNoLimit) project(MaxNorm{settings_.max_norm}, RowResult::kMaxNorm);

    if (moves(kSlow)) add(Loop::kLookahead, settings_.lookahead_alpha);
    if (moves(kEma)) add(Loop::kEma, ema_weight(settings_, moment_.ema_count));
    if (moves(kSwa)) add(Loop::kSwa, 1 / moment_.swa_count);
    if (extra_bits() != 0) pipeline_.in_tiles = true;
    end_pass(loads | extra_bits(), stores | extra_bits());
  }

  const Settings& settings_;
  const Moment& moment_;
  const Sweep& sweep_;
  const Purpose purpose_;
  const Beside& beside_;
  Pipeline& pipeline_;
  bool multiplied_ = false;  // the gradient's factors are multiplied in
};

GRADSTEP_DEVICE_TOO void make_pipeline(const Settings& settings, const Moment& moment, const Sweep& sweep, Purpose purpose,
                                       const Beside& beside, Pipeline& pipeline) {
  if (sweep.compute == Format::kFloat32) {
    PipelineBuilder<float>(settings, moment, sweep, purpose, beside, pipeline).build();
  } else {
    PipelineBuilder<double>(settings, moment, sweep, purpose, beside, pipeline).build();
  }
}

}  // namespace gradstep
