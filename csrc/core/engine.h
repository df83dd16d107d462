// What an engine is given for one step of a list of tensors, and what it returns. The CPU's engine is `cpu::Step`. A GPU's
// comes from an extension of its own, `_cuda`, by way of a `device::Driver`: nothing here needs CUDA.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "pipeline.h"
#include "step.h"

namespace gradstep {

// A number that stands in a device's memory: a count or a norm beside a parameter's states, a learning rate, a loss scale.
struct DeviceNumber {
  enum class Kind : std::int32_t { kFloat32, kFloat64, kInt64 };

  std::byte* at = nullptr;  // null: there is none
  Kind kind = Kind::kFloat64;

  GRADSTEP_HD explicit operator bool() const { return at != nullptr; }
  GRADSTEP_HD double get() const {
    if (kind == Kind::kFloat32) return static_cast<double>(*reinterpret_cast<const float*>(at));
    if (kind == Kind::kFloat64) return *reinterpret_cast<const double*>(at);
    return static_cast<double>(*reinterpret_cast<const std::int64_t*>(at));
  }
  GRADSTEP_HD void set(double value) const {
    if (kind == Kind::kFloat32) *reinterpret_cast<float*>(at) = static_cast<float>(value);
    else if (kind == Kind::kFloat64) *reinterpret_cast<double*>(at) = value;
    else *reinterpret_cast<std::int64_t*>(at) = static_cast<std::int64_t>(value);
  }
};

// The numbers of one tensor that a device counts by itself, so that nobody has to wait for it. Where one is given, it stands
// for the field of `Moment` (which is then not looked at), and the step moves it unless it is left out. Counts are those before
// the step.
struct DeviceNumbers {
  DeviceNumber step, ema_count, swa_count, norm;
  bool first_at_1 = false;  // the rule's `First` is for step 1 of these states; `Moment::first`: in any case
};

struct StepItem {
  const Sweep* sweep;
  const Settings* settings;
  Moment moment;
  double* norm_state = nullptr;  // NovoGrad's second moment, which the step moves; of the host
  DeviceNumbers numbers = {};    // of a device; none for the CPU's engine
  DeviceNumber lr = {};          // the learning rate, in the place of the settings'; the same for all items of the settings
};

struct Outcome {
  static constexpr std::size_t kNone = static_cast<std::size_t>(-1);
  std::size_t nonfinite = kNone;  // the first item for which the step was left out
  double clip_factor = 1;         // of the overall norm
  std::vector<Seen> seen;         // one an item, with `stats`

  bool skipped() const { return nonfinite != kNone; }
};

namespace device {

// Something that a device could not do; the text says what, and for which rule.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a step on a device has to be told beside.
struct Context {
  void* stream = nullptr;    // a cudaStream_t, of the engine's device
  DeviceNumber grad_scale;   // torch.amp.GradScaler's: gradients are divided by it
  DeviceNumber found_inf;    // its too: the step is left out if it is not 0
};

// A step that has been given to a device, and may not have been carried out yet.
class Pending {
 public:
  virtual ~Pending() = default;
  virtual bool is_done() = 0;
  virtual const Outcome& wait() = 0;  // throws Error
};

// Steps of one optimizer on one device. It remembers what it has told the device, and tells it only what has changed.
class Engine {
 public:
  virtual ~Engine() = default;

  // Gives the step to the device's stream and returns, without waiting for it. `keeps_outcome`: somebody will ask for it: then
  // the outcome comes with its statistics, and the norms that belong to the host (`StepItem::norm_state`) are set by `wait`.
  // Throws Error; nothing has been enqueued then. Items, sweeps and settings need not live on; memory on the device has to
  // until the stream has passed the step.
  virtual std::shared_ptr<Pending> run(const std::vector<StepItem>& items, const StepOptions& options, const Context& context,
                                       bool keeps_outcome) = 0;
};

// The devices of one kind.
class Driver {
 public:
  virtual ~Driver() = default;
  virtual int n_devices() = 0;  // throws Error with the reason if there are none
  virtual std::unique_ptr<Engine> make_engine(int device) = 0;
  // Makes `stream` wait for what stands in `other` now.
  virtual void wait_for(int device, void* stream, void* other) = 0;
  virtual std::string describe(int device) = 0;
  // On which device memory lies, for arrays that do not say it.
  virtual int device_of(const void* memory) = 0;
};

}  // namespace device
}  // namespace gradstep
