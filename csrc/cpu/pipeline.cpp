#include "pipeline.h"

#include <new>

#include "isa.h"

namespace gradstep::cpu {
namespace {

template <class Constants, class... Args>
void construct(std::byte* at, const Args&... args) {
  static_assert(sizeof(Constants) <= Pipeline::kConstantBytes);
  ::new (at) Constants{args...};
}

template <class Rule, class T, class... DecayStage>
void update_constants(List<DecayStage...>, const Settings& settings, double step, std::byte* at) {
  static constexpr void (*kMake[])(const Rule&, double, double,
                                   std::byte*) = {[](const Rule& rule, double step, double weight_decay, std::byte* to) {
    using Update = typename Rule::template Update<T>;
    using DecayOp = typename DecayStage::template Op<T>;
    construct<Decayed<Update, DecayOp>>(to, Update(rule, step), DecayOp(DecayStage{weight_decay}, rule.lr));
  }...};
  kMake[static_cast<int>(settings.decay)](from_values<Rule>(settings.values.data()), step, settings.weight_decay, at);
}

template <class T, class... Rule>
void update_constants(List<Rule...>, const Settings& settings, double step, std::byte* at) {
  static constexpr void (*kMake[])(const Settings&, double, std::byte*) = {
      [](const Settings& all, double number, std::byte* to) { update_constants<Rule, T>(Decays{}, all, number, to); }...};
  kMake[settings.rule](settings, step, at);
}

template <class T, class... Stage>
void stage_constants(List<Stage...>, const Settings::Stage& stage, std::byte* at) {
  static constexpr void (*kMake[])(const double*, std::byte*) = {[](const double* values, std::byte* to) {
    construct<typename Stage::template Op<T>>(to, from_values<Stage>(values));
  }...};
  kMake[stage.stage](stage.values.data(), at);
}

template <class T>
void fill(const TypedKernels& kernels, const Settings& settings, double step, bool first, Pipeline& pipeline) {
  pipeline.size = 0;
  pipeline.needs_scratch = !settings.stages.empty();
  for (const auto& stage : settings.stages) {
    stage_constants<T>(GradientStages{}, stage, pipeline.constants[pipeline.size]);
    pipeline.operations[pipeline.size++] = kernels.stages[stage.stage];
  }
  update_constants<T>(Rules{}, settings, step, pipeline.constants[pipeline.size]);
  pipeline.operations[pipeline.size++] = kernels.update[settings.rule][static_cast<int>(settings.decay)][first];
}

}  // namespace

void make_pipeline(const Settings& settings, double step, bool first, Format compute, Pipeline& pipeline) {
  const TypedKernels& typed = kernels().of(compute);
  if (compute == Format::kFloat32) fill<float>(typed, settings, step, first, pipeline);
  else fill<double>(typed, settings, step, first, pipeline);
}

void make_touch_pipeline(int states, Format compute, Pipeline& pipeline) {
  pipeline.size = 1;
  pipeline.needs_scratch = false;
  pipeline.operations[0] = kernels().of(compute).touch[states];
  construct<double>(pipeline.constants[0], 0.0);
}

}  // namespace gradstep::cpu
