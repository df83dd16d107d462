// The host's side of the GPU's engine: tables, which are sent where they have changed, and the launches of a step.
//
//   [prepare, sums, groups, settle]   where norms are needed
//   [prepare, tiles, groups, follow]  for `cautious`, for trust ratios
//   prepare, update or tiles
//   [groups, report]                  where statistics are
//
// The host decides by settings and formats alone which programs are launched. What depends on counts and sums the device
// decides: whether the step is left out, which stages are due, every factor.
#include <algorithm>
#include <cstring>
#include <map>
#include <tuple>

#include "memory.h"

namespace gradstep::cuda {
namespace {

using device::Error;

// Chunks of one kind, and how they are launched.
struct Batch {
  Launch launch;
  std::vector<Chunk> chunks;
  const char* rule;  // for messages
};

template <class... Rule>
const char* name_of_rule(List<Rule...>, int index) {
  static constexpr const char* kNames[] = {Rule::name...};
  return kNames[index];
}

bool is_plain(const Operand& operand) { return !operand.strides && !is_compressed(operand.format); }

// Whether the update goes through the program of its rule: whatever the counts are.
bool is_direct(const Settings& settings, const Sweep& sweep, const StepOptions& options) {
  const bool stages = !settings.gradient_stages.empty() || settings.noise > 0 || !settings.param_stages.empty() ||
                      settings.cautious || settings.extras() != 0 || settings.states_by_chance ||
                      (settings.trust_ratio && !settings.decay_in_ratio && settings.decay == Decay::kDecoupled);
  const bool nearest = settings.precision == Precision::kNearest || !is_half(sweep.operands[0].format);
  if (stages || !nearest || sweep.row > 0 || options.stats || options.zero_gradient || options.weights) return false;
  return std::all_of(sweep.operands, sweep.operands + sweep.n_operands, is_plain);
}

Stored how_stored(const Sweep& sweep) {
  const bool in_place = std::all_of(sweep.operands, sweep.operands + sweep.n_operands,
                                    [&](const Operand& operand) { return operand.is_in_place(sweep.compute); });
  return in_place ? Stored::kInPlace : Stored::kMixed;
}

// Whether the sums over the gradient are those of its squares alone, as it lies in memory.
bool sums_directly(const Settings& settings, const Sweep& sweep, const StepOptions& options, bool counts) {
  return !counts && !sums_gradient_apart(settings) && settings.adaptation != Adaptation::kLars && !options.weights &&
         sweep.row == 0 && is_plain(sweep.operands[1]);
}

// What a step reports, on its way to the host.
class Report : public device::Pending {
 public:
  Report(std::shared_ptr<Device::Download> download, bool stats, std::vector<double*> norms)
      : download_(std::move(download)), stats_(stats), norms_(std::move(norms)) {}

  bool is_done() override { return is_read_ || download_->is_done(); }

  const Outcome& wait() override {
    if (is_read_) return outcome_;
    const std::byte* at = download_->wait();
    const auto take = [&]<class X>(X& value) {
      std::memcpy(&value, at, sizeof value);
      at += sizeof value;
    };
    Status status;
    take(status);
    outcome_.nonfinite = static_cast<std::size_t>(status.result);
    outcome_.clip_factor = outcome_.skipped() ? 1 : status.clip_factor;
    for (double* norm : norms_) {
      double value;
      take(value);
      if (norm && !outcome_.skipped()) *norm = value;
    }
    if (stats_) {
      outcome_.seen.resize(norms_.size());
      for (Seen& seen : outcome_.seen) take(seen);
    }
    is_read_ = true;
    download_.reset();
    return outcome_;
  }

 private:
  std::shared_ptr<Device::Download> download_;
  bool stats_, is_read_ = false;
  std::vector<double*> norms_;  // where those of the host go; null for others
  Outcome outcome_;
};

// A step that nobody asks about.
class Forgotten : public device::Pending {
 public:
  bool is_done() override { return true; }
  const Outcome& wait() override { return outcome_; }

 private:
  Outcome outcome_;
};

// The tables of one list of tensors. A step that is recorded gets its own: the recording is replayed with what stands in them.
struct Tables {
  Sent items, layouts, now, settings, weights, chunks[6];
  Own pipelines, moments, factors, came, sums, terms, blocks, groups, report, long_rows;

  void release(Device& device) {
    for (Sent* sent : {&items, &layouts, &now, &settings, &weights}) sent->release(device);
    for (Sent& sent : chunks) sent.release(device);
    for (Own* own : {&pipelines, &moments, &factors, &came, &sums, &terms, &blocks, &groups, &report, &long_rows})
      own->release(device);
  }
};

// One step: what it sends, and what it launches.
class OneStep {
 public:
  OneStep(Device& device, Tables& tables, const std::vector<StepItem>& items, const StepOptions& options,
          const device::Context& context, bool keeps_outcome, bool marks)
      : device_(device),
        tables_(tables),
        items_(items),
        options_(options),
        stream_(context.stream),
        keeps_outcome_(keeps_outcome),
        marks_(marks) {
    args_.grad_scale = context.grad_scale;
    args_.found_inf = context.found_inf;
    args_.options = options;
  }

  std::shared_ptr<device::Pending> run() {
    for (const StepItem& item : items_) needs_.add(options_, *item.settings, item.sweep->compute);
    cautious_ = any([](const StepItem& item) { return item.settings->cautious; });
    trusted_ = any([](const StepItem& item) { return item.settings->trust_ratio; });
    plan_batches();
    if (keeps_outcome_) download_ = device_.make_download(report_bytes(options_.stats));
    if (!marks_) return enqueue();
    device_.begin_step(stream_);  // before the tables of the step before are written to
    try {
      auto pending = enqueue();
      device_.end_step(stream_);
      return pending;
    } catch (...) {
      device_.end_step(stream_);
      throw;
    }
  }

 private:
  std::shared_ptr<device::Pending> enqueue() {
    fill_tables();
    send_chunks();
    args_.begins = true;
    if (needs_.norms) {
      sweep(Purpose::kNorms);
      add_groups();
      launch({Program::kSettle, 1});
      args_.settled = true;
    }
    if (cautious_) {
      sweep(Purpose::kAgreement);
      add_groups();
      launch({Program::kFollow, 1});
    }
    if (trusted_) {
      sweep(Purpose::kTrust);
      add_groups();
      launch({Program::kFollow, 1});
    }
    sweep(Purpose::kUpdate);
    if (options_.stats) {
      add_groups();
      launch({Program::kReport, 1});
    }
    if (options_.zero_skipped) {
      args_.only_if_skipped = true;
      sweep(Purpose::kZero);
    }
    std::shared_ptr<device::Pending> pending = std::make_shared<Forgotten>();
    if (keeps_outcome_) pending = report();
    return pending;
  }

  template <class Holds>
  bool any(Holds holds) const {
    return std::any_of(items_.begin(), items_.end(), holds);
  }

  // ---- tables ---------------------------------------------------------------------------------------------------------------

  void fill_tables() {
    const std::size_t n = items_.size();
    std::vector<Item> items(n);
    std::vector<Now> now(n);
    std::vector<Settings> settings;
    const Settings* last = nullptr;
    std::int64_t blocks = 0, long_rows = 0;
    std::uint32_t groups = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const StepItem& given = items_[i];
      if (given.settings != last) settings.push_back(*given.settings);
      last = given.settings;
      items[i].sweep = *given.sweep;
      const bool has_rest = given.settings->precision > Precision::kStochastic && is_half(given.sweep->operands[0].format);
      if (!has_rest) items[i].sweep.rest = {};
      items[i].first_block = static_cast<std::uint32_t>(blocks);
      items[i].first_group = groups;
      blocks += given.sweep->n_blocks();
      groups += static_cast<std::uint32_t>(n_groups(*given.sweep));
      if (blocks > std::int64_t{UINT32_MAX} / kSums) throw Error("has more elements than one step can count");
      now[i] = {given.moment, given.norm_state ? *given.norm_state : 0,       given.numbers,
                given.lr,     static_cast<std::int32_t>(settings.size()) - 1, given.moment.first || given.numbers.first_at_1};
    }
    // What sweeps point to, after the sizes are known.
    const auto words_of = [](const Sweep& sweep) {
      std::size_t words = 0;
      for_operands(sweep, [&](const Operand& operand) { words += operand.strides ? static_cast<std::size_t>(sweep.ndim) : 0; });
      return words + (words > 0 ? static_cast<std::size_t>(sweep.ndim) : 0);
    };
    constexpr std::size_t kOperandWords = sizeof(Operand) / sizeof(std::int64_t);
    static_assert(sizeof(Operand) % sizeof(std::int64_t) == 0);
    std::size_t words = 0;
    for (const Item& item : items) {
      words += words_of(item.sweep) + kOperandWords * static_cast<std::size_t>(item.sweep.n_more_gradients);
    }
    std::vector<std::int64_t> layouts(words);
    const auto* base = tables_.layouts.room<std::int64_t>(device_, words);  // first: pointers into the array stand in the array
    std::size_t at = 0;
    const auto keep = [&](const std::int64_t*& words_at, int count) {
      if (!words_at) return;
      std::copy_n(words_at, count, layouts.data() + at);
      words_at = base + at;
      at += static_cast<std::size_t>(count);
    };
    for (Item& item : items) {
      Sweep& sweep = item.sweep;
      bool strided = false;
      for_operands(sweep, [&](const Operand& operand) { strided = strided || operand.strides; });
      std::vector<Operand> more(sweep.more_gradients, sweep.more_gradients + sweep.n_more_gradients);
      for (int k = 0; k < sweep.n_operands; ++k) keep(sweep.operands[k].strides, sweep.ndim);
      keep(sweep.rest.strides, sweep.ndim);
      for (Operand& operand : more) keep(operand.strides, sweep.ndim);
      if (strided) keep(sweep.shape, sweep.ndim);
      else sweep.shape = nullptr;
      if (!more.empty()) {
        std::memcpy(layouts.data() + at, more.data(), more.size() * sizeof(Operand));
        sweep.more_gradients = reinterpret_cast<const Operand*>(base + at);
        at += more.size() * kOperandWords;
      } else {
        sweep.more_gradients = nullptr;
      }
      const bool keeps = sweep.row > kTile && !sweep.operands[0].is_in_place(sweep.compute);
      item.long_rows =
          keeps ? reinterpret_cast<std::byte*>(std::uintptr_t{1} + static_cast<std::uintptr_t>(long_rows)) : nullptr;
      if (keeps) long_rows += (sweep.size * (sweep.compute == Format::kFloat32 ? 4 : 8) + 15) / 16 * 16;
    }
    auto* copies = tables_.long_rows.get<std::byte>(device_, static_cast<std::size_t>(long_rows));
    for (Item& item : items) {
      if (item.long_rows) item.long_rows = copies + (reinterpret_cast<std::uintptr_t>(item.long_rows) - 1);
    }
    args_.n_items = static_cast<std::uint32_t>(n);
    args_.n_groups = groups;
    args_.sums_all = needs_.all;
    args_.counts = needs_.counts;
    tables_.layouts.send(device_, layouts, stream_);
    args_.items = tables_.items.send(device_, items, stream_);
    args_.now = tables_.now.send(device_, now, stream_);
    args_.settings = tables_.settings.send(device_, settings, stream_);
    if (options_.weights) {
      const std::vector<double> weights(options_.weights, options_.weights + options_.n_gradients);
      args_.weights = tables_.weights.send(device_, weights, stream_);
    }
    args_.pipelines = tables_.pipelines.get<Pipeline>(device_, n);
    args_.moments = tables_.moments.get<Moment>(device_, n);
    args_.factors = tables_.factors.get<Factors>(device_, n);
    args_.came = tables_.came.get<Sums>(device_, n);
    args_.sums = tables_.sums.get<Sums>(device_, n);
    args_.terms = tables_.terms.get<double>(device_, n);
    args_.blocks = tables_.blocks.get<Sums>(device_, static_cast<std::size_t>(blocks));
    args_.groups = tables_.groups.get<Sums>(device_, groups);
    auto* report = tables_.report.get<std::byte>(device_, report_bytes(true));
    args_.status = reinterpret_cast<Status*>(report);
    args_.norms = reinterpret_cast<double*>(report + sizeof(Status));
    args_.seen = reinterpret_cast<Seen*>(report + sizeof(Status) + n * sizeof(double));
  }

  template <class Each>
  static void for_operands(const Sweep& sweep, Each each) {
    for (int k = 0; k < sweep.n_operands; ++k) each(sweep.operands[k]);
    each(sweep.rest);
    for (int k = 0; k < sweep.n_more_gradients; ++k) each(sweep.more_gradients[k]);
  }

  std::size_t report_bytes(bool stats) const {
    return sizeof(Status) + items_.size() * (sizeof(double) + (stats ? sizeof(Seen) : 0));
  }

  // ---- launches -------------------------------------------------------------------------------------------------------------

  using Kind = std::tuple<Program, Format, int, Stored>;

  // Sorts the blocks of all items that take part in a sweep by the program that carries them.
  std::vector<Batch> batches_of(Purpose purpose) const {
    std::map<Kind, Batch> batches;
    for (std::size_t i = 0; i < items_.size(); ++i) {
      const Settings& settings = *items_[i].settings;
      const Sweep& sweep = *items_[i].sweep;
      if (purpose == Purpose::kNorms && !needs_.all && !settings.wants_gradient_norms()) continue;
      if (purpose == Purpose::kAgreement && !settings.cautious) continue;
      if (purpose == Purpose::kTrust && !settings.trust_ratio) continue;
      Kind kind{Program::kTiles, sweep.compute, 0, Stored::kInPlace};
      if (purpose == Purpose::kNorms && sums_directly(settings, sweep, options_, needs_.counts)) {
        kind = {Program::kSums, sweep.compute, 0, Stored::kInPlace};
      } else if (purpose == Purpose::kUpdate && is_direct(settings, sweep, options_)) {
        kind = {Program::kUpdate, sweep.compute, settings.rule, how_stored(sweep)};
      }
      Batch& batch = batches[kind];
      const auto [program, compute, rule, stored] = kind;
      std::uint32_t shared = 0;
      if (program == Program::kSums) shared = kSumBlock / kTile * sizeof(double);
      if (program == Program::kTiles) {
        shared = shared_bytes(n_slots(sweep), compute == Format::kFloat32 ? 4 : 8, sweep.row > 0);
      }
      batch.rule = name_of_rule(Rules{}, settings.rule);
      if (shared > device_.largest_shared()) {
        throw Error(std::string("takes ") + std::to_string(shared) + " bytes of shared memory for the rule " + batch.rule +
                    " with these stages, the device has " + std::to_string(device_.largest_shared()));
      }
      batch.launch = {program, 0, compute, rule, stored, std::max(shared, batch.launch.shared)};
      for (std::int64_t block = 0; block < sweep.n_blocks(); ++block) {
        batch.chunks.push_back({static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(block)});
      }
    }
    std::vector<Batch> all;
    for (auto& [kind, batch] : batches) {
      batch.launch.tasks = static_cast<std::uint32_t>(batch.chunks.size());
      if (batch.launch.tasks > 0) all.push_back(std::move(batch));
    }
    return all;
  }

  // Everything that can be refused is refused here, before anything is enqueued.
  void plan_batches() {
    std::vector<Purpose> purposes{Purpose::kUpdate};
    if (needs_.norms) purposes.push_back(Purpose::kNorms);
    if (cautious_) purposes.push_back(Purpose::kAgreement);
    if (trusted_) purposes.push_back(Purpose::kTrust);
    if (options_.zero_skipped) purposes.push_back(Purpose::kZero);
    for (const Purpose purpose : purposes) planned_[static_cast<std::size_t>(purpose)].batches = batches_of(purpose);
  }

  void send_chunks() {
    for (std::size_t purpose = 0; purpose < std::size(planned_); ++purpose) {
      auto& [batches, chunks] = planned_[purpose];
      std::vector<Chunk> all;
      for (const Batch& batch : batches) all.insert(all.end(), batch.chunks.begin(), batch.chunks.end());
      if (!all.empty()) chunks = tables_.chunks[purpose].send(device_, all, stream_);
    }
  }

  void sweep(Purpose purpose) {
    args_.purpose = purpose;
    launch({Program::kPrepare, args_.n_items});
    args_.begins = false;
    const auto& [batches, chunks] = planned_[static_cast<std::size_t>(purpose)];
    args_.chunks = chunks;
    for (const Batch& batch : batches) {
      launch(batch.launch, batch.rule);
      args_.chunks += batch.launch.tasks;
    }
  }

  void add_groups() {
    if (args_.n_groups > 0) launch({Program::kGroups, args_.n_groups * static_cast<std::uint32_t>(kSums)});
  }

  void launch(const Launch& launch, const char* rule = nullptr) {
    try {
      device_.launch(launch, args_, stream_);
    } catch (const Error& error) {
      throw Error(std::string("the launch of ") + (rule ? std::string("the rule ") + rule : "a step") +
                  " failed: " + error.what());
    }
  }

  std::shared_ptr<device::Pending> report() {
    std::vector<double*> norms;
    for (const StepItem& item : items_) {
      const bool hosts = item.settings->adaptation == Adaptation::kNovograd && !item.numbers.norm;
      norms.push_back(hosts ? item.norm_state : nullptr);
    }
    download_->begin(args_.status, stream_);
    return std::make_shared<Report>(std::move(download_), options_.stats, std::move(norms));
  }

  Device& device_;
  Tables& tables_;
  const std::vector<StepItem>& items_;
  const StepOptions& options_;
  void* stream_;
  const bool keeps_outcome_, marks_;
  bool cautious_ = false, trusted_ = false;
  std::shared_ptr<Device::Download> download_;
  Needs needs_;
  Args args_{};
  struct Planned {
    std::vector<Batch> batches;
    const Chunk* chunks = nullptr;
  };
  Planned planned_[6];
};

class StepEngine : public device::Engine {
 public:
  explicit StepEngine(std::unique_ptr<Device> device) : device_(std::move(device)) {}

  ~StepEngine() override {
    try {
      const auto current = device_->make_current();
      if (!all_tables_.empty()) all_tables_.front()->release(*device_);  // a graph may outlive the others' optimizer
    } catch (const Error&) {  // the device is gone, and its memory with it
    }
  }

  std::shared_ptr<device::Pending> run(const std::vector<StepItem>& items, const StepOptions& options,
                                       const device::Context& context, bool keeps_outcome) override {
    if (items.empty()) return std::make_shared<Forgotten>();
    const auto current = device_->make_current();
    const bool recording = device_->is_recording(context.stream);
    if (recording && keeps_outcome) {
      throw Error("a step that is captured in a CUDA graph can have no statistics, and nothing on the host that waits for it");
    }
    if (recording || all_tables_.empty()) all_tables_.push_back(std::make_unique<Tables>());
    Tables& tables = *(recording ? all_tables_.back() : all_tables_.front());
    if (recording && all_tables_.size() == 1) all_tables_.insert(all_tables_.begin(), std::make_unique<Tables>());
    return OneStep(*device_, tables, items, options, context, keeps_outcome, !recording).run();
  }

 private:
  std::unique_ptr<Device> device_;
  std::vector<std::unique_ptr<Tables>> all_tables_;  // the first is that of steps that are not recorded
};

}  // namespace

std::unique_ptr<device::Engine> make_engine(std::unique_ptr<Device> device) {
  return std::make_unique<StepEngine>(std::move(device));
}

}  // namespace gradstep::cuda
