#include "pipeline.h"

#include <new>

#include "../core/factors.h"
#include "isa.h"

namespace gradstep::cpu {
namespace {

// ---- constants ------------------------------------------------------------------------------------------------------------

template <class Constants, class... Args>
void construct(std::byte* at, const Args&... args) {
  static_assert(sizeof(Constants) <= Pipeline::kConstantBytes);
  ::new (at) Constants{args...};
}

// Of `Rule`'s update next to each of the decays.
template <class Rule, class T, class... DecayStage>
void update_constants(List<DecayStage...>, const Settings& settings, Decay decay, double step, std::byte* at) {
  static constexpr void (*kMake[])(const Rule&, const Settings&, double,
                                   std::byte*) = {[](const Rule& rule, const Settings& all, double number, std::byte* to) {
    using Update = typename Rule::template Update<T>;
    using DecayOp = typename DecayStage::template Op<T>;
    construct<Decayed<Update, DecayOp>>(to, Update(rule, number), DecayOp(DecayStage{all.weight_decay}, decay_rate(all)));
  }...};
  kMake[static_cast<int>(decay)](from_values<Rule>(settings.values.data()), settings, step, at);
}

template <class T, class... Rule>
void update_constants(List<Rule...>, const Settings& settings, Decay decay, double step, std::byte* at) {
  static constexpr void (*kMake[])(const Settings&, Decay, double,
                                   std::byte*) = {[](const Settings& all, Decay which, double number, std::byte* to) {
    update_constants<Rule, T>(Decays{}, all, which, number, to);
  }...};
  kMake[settings.rule](settings, decay, step, at);
}

template <class T, class... Stage, class... Args>
void stage_constants(List<Stage...>, const Settings::Stage& stage, std::byte* at, Args... args) {
  static constexpr void (*kMake[])(const double*, std::byte*,
                                   Args...) = {[](const double* values, std::byte* to, Args... more) {
    construct<typename Stage::template Op<T>>(to, from_values<Stage>(values), more...);
  }...};
  kMake[stage.stage](stage.values.data(), at, args...);
}

// ---- the pipeline ---------------------------------------------------------------------------------------------------------

template <class T>
class Builder {
 public:
  Builder(const TypedKernels& kernels, const Settings& settings, const Moment& moment, const Sweep& sweep, Purpose purpose,
          const Beside& beside, Pipeline& pipeline)
      : kernels_(kernels),
        settings_(settings),
        moment_(moment),
        sweep_(sweep),
        purpose_(purpose),
        beside_(beside),
        pipeline_(pipeline) {
    // Emptied piece by piece: the constants need not be.
    pipeline.size = pipeline.n_passes = 0;
    pipeline.scale = settings.scale;
    pipeline.weights = nullptr;
    pipeline.by_row = sweep.row > 0;
    pipeline.zeroes_gradient = purpose == Purpose::kZero || (purpose == Purpose::kUpdate && beside.zero_gradient);
    pipeline.in_tiles = pipeline.by_row || pipeline.zeroes_gradient;
    pipeline.precision = is_half(sweep.operands[0].format) ? settings.precision : Precision::kNearest;
    pipeline.states_by_chance = settings.states_by_chance;
    pipeline.seed = static_cast<std::uint64_t>(settings.seed);
    pipeline.brains = 0;
  }

  void build() {
    const bool agc = settings_.agc != kNoLimit;
    const bool centralize = settings_.centralize && moment_.has_rows && purpose_ != Purpose::kNorms;
    const bool noise = settings_.noise > 0;
    if (purpose_ == Purpose::kZero) return end_pass(0, 0);
    if (purpose_ == Purpose::kParams) {
      add(Loop::kSumParam);
      return end_pass(1, 0);
    }

    // The gradient is prepared in the scratch if anything but a factor changes it.
    if (beside_.several_gradients || !settings_.gradient_stages.empty() || agc || centralize) {
      pipeline_.weights = beside_.weights;
      pipeline_.scale = 1;
      pipeline_.in_tiles = true;
    }
    if (agc || centralize) {
      add_gradient_stages(false);
      const int constants = pipeline_.size;
      construct<GradientRow>(pipeline_.constants[constants], settings_.agc, settings_.agc_eps);
      if (agc) add(Loop::kSumRowSquares);
      if (centralize) add(Loop::kSumRow);
      end_pass(reads(), 0, finish_row<GradientRow>, constants);
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
      update_constants<T>(Rules{}, settings_, settings_.decay, moment_.step, constants());
      const Brains brains = take_brains();
      add(kernels_.update[static_cast<int>(brains)][settings_.rule][static_cast<int>(settings_.decay)][moment_.first]);
    }
    add_param_stages();
  }

 private:
  std::byte* constants() { return pipeline_.constants[pipeline_.size]; }

  // The constants are those at constants(), filled in before.
  void add(Operation operation) { pipeline_.operations[pipeline_.size++] = operation; }
  void add(Loop loop) { add(kernels_.loops[static_cast<int>(loop)]); }
  template <class Constants>
  void add(Loop loop, const Constants& values) {
    construct<Constants>(constants(), values);
    add(loop);
  }

  void end_pass(std::uint32_t loads, std::uint32_t stores, RowOperation finish = nullptr, int finish_constants = 0) {
    const int begin = pipeline_.n_passes == 0 ? 0 : pipeline_.passes[pipeline_.n_passes - 1].end;
    pipeline_.passes[pipeline_.n_passes++] = {begin, pipeline_.size, loads, stores, finish, finish_constants};
  }

  // Parameter, gradient and states; all but the gradient.
  std::uint32_t reads() const { return (1u << (2 + sweep_.n_states)) - 1; }
  std::uint32_t writes() const { return reads() & ~2u; }

  std::uint32_t extra_bits() const {
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
  bool moves(Extra extra) const {
    if (extra == kSlow) return lookahead_moves(settings_, moment_.step);
    return extra == kSwa ? swa_takes(settings_, moment_.step) : settings_.has(kEma);
  }

  void add_gradient_stages(bool count) {
    if (count) {
      pipeline_.in_tiles = true;
      add(Loop::kCountGrad);
    }
    for (const auto& stage : settings_.gradient_stages) {
      stage_constants<T>(GradientStages{}, stage, constants());
      add(kernels_.gradient_stages[stage.stage]);
    }
  }

  void multiply_factors() {
    pipeline_.in_tiles = multiplied_ = true;
    add(Loop::kFactors);
  }

  void add_noise() {
    const double sigma = noise_sigma(settings_, moment_.step);
    const auto step = static_cast<std::uint64_t>(moment_.step);
    add(Loop::kNoise, NoiseConstants{sigma, static_cast<std::uint64_t>(settings_.seed),
                                     static_cast<std::uint32_t>(moment_.position), static_cast<std::uint32_t>(step)});
  }

  // Which operands the update takes as they are stored. What other operations look at they find in the compute type, and what
  // is stored otherwise than to nearest goes through a copy.
  Brains take_brains() {
    const bool alone = !pipeline_.in_tiles && settings_.extras() == 0 && settings_.param_stages.empty();
    if (!alone || sizeof(T) != sizeof(float) || beside_.several_gradients) return Brains::kNone;
    const auto is_brain = [&](int k) { return sweep_.operands[k].format == Format::kBFloat16 && !sweep_.operands[k].strides; };
    bool states = sweep_.n_states > 0 && !pipeline_.states_by_chance;
    for (int k = 2; k < 2 + sweep_.n_states; ++k) states = states && is_brain(k);
    const bool grad = is_brain(1), param = grad && is_brain(0) && pipeline_.precision == Precision::kNearest;
    const std::uint32_t all_states = reads() & ~3u;
    pipeline_.brains = (param ? 1u : 0u) | (grad ? 2u : 0u) | (states ? all_states : 0u);
    if (param) return states ? Brains::kAll : Brains::kParamAndGrad;
    if (grad) return states ? Brains::kGradAndStates : Brains::kGrad;
    return states ? Brains::kStates : Brains::kNone;
  }

  // Gradient, update and parameter one after another, with what looks at the update in between.
  void add_update_apart() {
    const bool update = purpose_ == Purpose::kUpdate;
    pipeline_.in_tiles = true;
    if (!multiplied_ && (beside_.has_factors || pipeline_.scale != 1)) multiply_factors();
    if (update && beside_.sum_update && changes_gradient(settings_)) add(Loop::kSumRuleGrad);
    if (settings_.decay == Decay::kCoupled) add(Loop::kCouple, settings_.weight_decay);
    // Decay and trust factor come along with the rule, unless something has to see the update before.
    const bool agreement = purpose_ == Purpose::kAgreement, decays = settings_.decay == Decay::kDecoupled;
    const bool beside = decays && (settings_.cautious || (settings_.trust_ratio && !settings_.decay_in_ratio));
    const bool with_decay = decays && !beside && !agreement;
    update_constants<T>(Rules{}, settings_, with_decay ? Decay::kDecoupled : Decay::kNone, moment_.step, constants());
    add(kernels_.direction[settings_.rule][with_decay][!update][moment_.first]);
    if (agreement) return add(Loop::kCountAgreeing);
    if (settings_.cautious) add(Loop::kCautious);
    const auto decay = [&] { add(Loop::kDecay, decay_rate(settings_) * settings_.weight_decay); };
    if (beside && settings_.decay_in_ratio) decay();
    if (purpose_ == Purpose::kTrust) return add(Loop::kSumUpdate);
    if (settings_.trust_ratio && settings_.cautious) add(Loop::kTrust);
    if (beside && !settings_.decay_in_ratio) decay();
    if (beside_.sum_update) add(Loop::kSumUpdate);
    add(Loop::kApply);
  }

  void add_param_stages() {
    for (const auto& stage : settings_.param_stages) {
      pipeline_.in_tiles = true;
      stage_constants<T>(ParamStages{}, stage, constants(), settings_.lr());
      add(kernels_.param_stages[stage.stage]);
    }
    std::uint32_t loads = reads(), stores = writes();
    const auto project = [&]<class Row>(Row row) {
      const int at = pipeline_.size;
      add(Loop::kSumParamRow, row);
      end_pass(loads, stores, finish_row<Row>, at);
      loads = stores = 1;
      add(Loop::kScaleParamRow);
    };
    if (moment_.has_rows && settings_.group_lasso > 0) project(GroupLasso{settings_.lr() * settings_.group_lasso});
    if (moment_.has_rows && settings_.max_norm != kNoLimit) project(MaxNorm{settings_.max_norm});

    if (moves(kSlow)) add(Loop::kLookahead, settings_.lookahead_alpha);
    if (moves(kEma)) add(Loop::kEma, ema_weight(settings_, moment_.ema_count));
    if (moves(kSwa)) add(Loop::kSwa, 1 / moment_.swa_count);
    if (extra_bits() != 0) pipeline_.in_tiles = true;
    end_pass(loads | extra_bits(), stores | extra_bits());
  }

  const TypedKernels& kernels_;
  const Settings& settings_;
  const Moment& moment_;
  const Sweep& sweep_;
  const Purpose purpose_;
  const Beside& beside_;
  Pipeline& pipeline_;
  bool multiplied_ = false;  // the gradient's factors are multiplied in
};

}  // namespace

void make_pipeline(const Settings& settings, const Moment& moment, Format compute, const Sweep& sweep, Purpose purpose,
                   const Beside& beside, Pipeline& pipeline) {
  const TypedKernels& typed = kernels().of(compute);
  if (compute == Format::kFloat32) {
    Builder<float>(typed, settings, moment, sweep, purpose, beside, pipeline).build();
  } else {
    Builder<double>(typed, settings, moment, sweep, purpose, beside, pipeline).build();
  }
}

void make_loop_pipeline(Loop loop, std::uint32_t loads, std::uint32_t stores, Format compute, Pipeline& pipeline) {
  pipeline.operations[0] = kernels().of(compute).loops[static_cast<int>(loop)];
  pipeline.passes[0] = {0, 1, loads, stores, nullptr, 0};
  pipeline.size = pipeline.n_passes = 1;
}

void make_touch_pipeline(int states, Format compute, Pipeline& pipeline) {
  pipeline.operations[0] = kernels().of(compute).touch[states];
  construct<double>(pipeline.constants[0], 0.0);
  const std::uint32_t all = (1u << (2 + states)) - 1;
  pipeline.passes[0] = {0, 1, all, all & ~2u, nullptr, 0};
  pipeline.size = pipeline.n_passes = 1;
}

}  // namespace gradstep::cpu
