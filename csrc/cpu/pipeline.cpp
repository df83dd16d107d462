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

template <class Rule, class T>
void update_constants(const Settings& settings, double step, std::byte* at) {
  using Update = typename Rule::template Update<T>;
  const auto rule = from_values<Rule>(settings.values.data());
  if (settings.decoupled_decay == 0) construct<Update>(at, rule, step);
  else construct<Decayed<Update, T>>(at, Update(rule, step), T(rule.lr * settings.decoupled_decay));
}

template <class T, class... Rule>
void update_constants(List<Rule...>, const Settings& settings, double step, std::byte* at) {
  static constexpr void (*kMake[])(const Settings&, double, std::byte*) = {update_constants<Rule, T>...};
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
  pipeline.operations[pipeline.size++] = kernels.update[settings.rule][settings.decoupled_decay != 0][first];
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
