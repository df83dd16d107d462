#include "emulation.h"

#include <cstring>
#include <new>
#include <vector>

#include "../core/portable.h"
#include "../cpu/run.h"
#include "device.h"
#include "direct.h"
#include "team.h"
#include "tiles.h"

namespace gradstep::cuda {
namespace {

using device::Error;

template <class T, class Threads>
void run_update(const Launch& launch, const Threads& threads, const Args& args, std::uint32_t chunk) {
  visit_at(Rules{}, launch.rule, [&]<class Rule>() {
    if (launch.stored == Stored::kInPlace) update_directly<Rule, T, Stored::kInPlace>(threads, args, chunk);
    else update_directly<Rule, T, Stored::kMixed>(threads, args, chunk);
  });
}

template <class T, class Threads>
void run_chunk(const Launch& launch, const Threads& threads, const Args& args, std::uint32_t chunk) {
  if (launch.program == Program::kSums) sum_gradient<T>(threads, args, chunk);
  else if (launch.program == Program::kUpdate) run_update<T>(launch, threads, args, chunk);
  else carry_tiles<T>(threads, args, chunk);
}

template <class Threads>
void run_block(const Launch& launch, const Threads& threads, const Args& args, std::uint32_t block) {
  switch (launch.program) {
    case Program::kPrepare:
      return prepare(threads, args, block);
    case Program::kGroups:
      return add_groups(threads, args, block);
    case Program::kSettle:
      return settle(threads, args);
    case Program::kFollow:
      return follow(threads, args);
    case Program::kReport:
      return report(threads, args);
    default:
      if (launch.compute == Format::kFloat32) run_chunk<float>(launch, threads, args, block);
      else run_chunk<double>(launch, threads, args, block);
  }
}

class HostDevice : public Device {
 public:
  std::unique_ptr<Current> make_current() override { return std::make_unique<Current>(); }

  // Filled with what no table has, so that nothing is taken for sent that is not.
  void* allocate(std::size_t bytes) override {
    void* memory = ::operator new(bytes, std::align_val_t{256});
    std::memset(memory, 0xa5, bytes);
    return memory;
  }
  void release(void* memory) override { ::operator delete(memory, std::align_val_t{256}); }
  bool is_recording(void*) override { return false; }
  void upload(void* to, const std::byte* from, std::size_t bytes, void*) override {
    std::memcpy(to, from, bytes);
    emulation().sent += bytes;
  }

  void launch(const Launch& launch, const Args& args, void*) override {
    if (launch.tasks == 0) throw Error("invalid configuration argument");  // as CUDA says it
    if (emulation().fails && takes_chunks(launch.program)) throw Error("out of resources");
    emulation().launches.push_back(launch);
    const bool flushes = takes_chunks(launch.program) && cpu::flush_denormals();
    const std::uint32_t n = emulation().threads;
    const bool by_item = launch.program == Program::kPrepare || launch.program == Program::kGroups;
    const std::uint32_t blocks = by_item ? (launch.tasks + n - 1) / n : launch.tasks;
    std::vector<double> shared(launch.shared / sizeof(double) + 1);
    auto* memory = reinterpret_cast<std::byte*>(shared.data());
    for (std::uint32_t block = 0; block < blocks; ++block) {
      if (n == 1) {
        const FloatEnvironment environment(flushes);
        run_block(launch, HostThreads{memory}, args, block);
      } else {
        Team(n, memory).run([&](const TeamThreads& threads) {
          const FloatEnvironment environment(flushes);
          run_block(launch, threads, args, block);
        });
      }
    }
  }

  void begin_step(void*) override {}
  void end_step(void*) override {}

  std::shared_ptr<Download> make_download(std::size_t bytes) override {
    class Copy : public Download {
     public:
      explicit Copy(std::size_t bytes) : bytes_(bytes) {}
      void begin(const void* from, void*) override { std::memcpy(bytes_.data(), from, bytes_.size()); }
      bool is_done() override { return true; }
      const std::byte* wait() override { return bytes_.data(); }

     private:
      std::vector<std::byte> bytes_;
    };
    return std::make_shared<Copy>(bytes);
  }

  std::uint32_t largest_shared() const override { return 227 * 1024; }
};

class EmulatedDriver : public device::Driver {
 public:
  int n_devices() override { return 2; }
  std::unique_ptr<device::Engine> make_engine(int device) override {
    if (device < 0 || device >= n_devices()) throw Error("there is no device " + std::to_string(device));
    return cuda::make_engine(std::make_unique<HostDevice>());
  }
  void wait_for(int, void*, void*) override {}
  int device_of(const void*) override { return 0; }
  std::string describe(int device) override { return "emulated device " + std::to_string(device) + ", on the host"; }
};

}  // namespace

Emulation& emulation() {
  static Emulation state;
  return state;
}

device::Driver& emulated_driver() {
  static EmulatedDriver driver;
  return driver;
}

}  // namespace gradstep::cuda
