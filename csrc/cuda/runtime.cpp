#include "runtime.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <mutex>

#if !defined(_WIN32)
#include <unistd.h>
#endif

#include "device.h"
#include "launch.h"

namespace gradstep::cuda {
namespace {

using device::Error;

constexpr int kLeastMajor = 8;  // of a compute capability: the oldest that there is code for

// Throws what CUDA reports. An error of a launch is taken off CUDA's own record, so that nobody else finds it there.
void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw Error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Allows what is unsafe while any stream is being recorded, as long as it lives: what we do meanwhile is no part of a
// recording.
class Relaxed {
 public:
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  void hold_back(cudaStream_t stream) const { check(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent"); }
  bool is_done() const {
    const cudaError_t error = cudaEventQuery(event_);
    if (error == cudaErrorNotReady) {
      cudaGetLastError();
      return false;
    }
    check(error, "a step on the device failed");
    return true;
  }
  void wait() const { check(cudaEventSynchronize(event_), "a step on the device failed"); }

 private:
  cudaEvent_t event_ = nullptr;
};

// Memory of the host that a device copies to, used again when a copy has been made and nobody looks at it.
struct Landing {
  std::byte* memory = nullptr;
  std::size_t room = 0;
  Event landed;

  explicit Landing(std::size_t bytes) : room(bytes) {
    check(cudaMallocHost(reinterpret_cast<void**>(&memory), bytes), "cudaMallocHost");
  }
  ~Landing() { cudaFreeHost(memory); }
  Landing(const Landing&) = delete;
  Landing& operator=(const Landing&) = delete;
};

class Gpu : public Device {
 public:
  explicit Gpu(int index) : index_(index) {
    const auto current = make_current();
    int major = 0, minor = 0, shared = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "cudaDeviceGetAttribute");
    if (major < kLeastMajor) {
      throw Error("cuda:" + std::to_string(index) + " has compute capability " + std::to_string(major) + "." +
                  std::to_string(minor) + ", gradstep needs " + std::to_string(kLeastMajor) + ".0 or newer");
    }
    check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "cudaDeviceGetAttribute");
    check(allow_shared<float>(shared), "cudaFuncSetAttribute");
    check(allow_shared<double>(shared), "cudaFuncSetAttribute");
    shared_ = static_cast<std::uint32_t>(shared);
    check(cudaStreamCreateWithFlags(&aside_, cudaStreamNonBlocking), "cudaStreamCreate");
    last_step_ = std::make_unique<Event>();
  }
  ~Gpu() override {
    if (aside_) cudaStreamDestroy(aside_);
  }

  std::unique_ptr<Current> make_current() override {
    class Restore : public Current {
     public:
      explicit Restore(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (before_ == device) before_ = -1;
        else check(cudaSetDevice(device), "cudaSetDevice");
      }
      ~Restore() override {
        if (before_ >= 0) cudaSetDevice(before_);
      }

     private:
      int before_ = -1;
    };
    return std::make_unique<Restore>(index_);
  }

  void* allocate(std::size_t bytes) override {
    const Relaxed relaxed;
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), "cudaMalloc");
    return memory;
  }
  void release(void* memory) override {
    const Relaxed relaxed;
    cudaFree(memory);  // waits for the device
  }

  bool is_recording(void* stream) override {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
    return status != cudaStreamCaptureStatusNone;
  }

  void upload(void* to, const std::byte* from, std::size_t bytes, void* stream) override {
    if (is_recording(stream)) {
      const Relaxed relaxed;
      check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, aside_), "cudaMemcpyAsync");
      check(cudaStreamSynchronize(aside_), "cudaStreamSynchronize");
      return;
    }
    for (std::size_t at = 0; at < bytes; at += kPayload) {
      const std::size_t size = std::min(kPayload, bytes - at);
      check(launch_upload(static_cast<std::byte*>(to) + at, from + at, size, static_cast<cudaStream_t>(stream)),
            "sending a table to the device");
    }
  }

  void launch(const Launch& launch, const Args& args, void* stream) override {
    const auto on = static_cast<cudaStream_t>(stream);
    const auto launch_it = [&] {
      if (!takes_chunks(launch.program)) return launch_settle(launch, args, on);
      if (launch.program != Program::kTiles) return launch_direct(launch, args, on);
      return launch.compute == Format::kFloat32 ? launch_tiles<float>(launch, args, on)
                                                : launch_tiles<double>(launch, args, on);
    };
    const cudaError_t error = launch_it();
    if (error != cudaSuccess) throw Error(cudaGetErrorString(error));
  }

  // The tables are those of the step before: it has to be done with them.
  void begin_step(void* stream) override {
    if (stream != last_stream_) last_step_->hold_back(static_cast<cudaStream_t>(stream));
    last_stream_ = stream;
  }
  void end_step(void* stream) override { last_step_->record(static_cast<cudaStream_t>(stream)); }

  std::shared_ptr<Download> download(const void* from, std::size_t bytes, void* stream) override {
    const auto on = static_cast<cudaStream_t>(stream);
    const std::shared_ptr<Landing> landing = free_landing(bytes);
    check(cudaMemcpyAsync(landing->memory, from, bytes, cudaMemcpyDeviceToHost, on), "cudaMemcpyAsync");
    landing->landed.record(on);
    class Copy : public Download {
     public:
      explicit Copy(std::shared_ptr<Landing> landing) : landing_(std::move(landing)) {}
      bool is_done() override { return landing_->landed.is_done(); }
      const std::byte* wait() override {
        landing_->landed.wait();
        return landing_->memory;
      }

     private:
      std::shared_ptr<Landing> landing_;
    };
    return std::make_shared<Copy>(landing);
  }

  std::uint32_t largest_shared() const override { return shared_; }

 private:
  std::shared_ptr<Landing> free_landing(std::size_t bytes) {
    for (const auto& landing : landings_) {
      if (landing.use_count() == 1 && landing->room >= bytes && landing->landed.is_done()) return landing;
    }
    return landings_.emplace_back(std::make_shared<Landing>(bytes));
  }

  const int index_;
  std::uint32_t shared_ = 0;
  cudaStream_t aside_ = nullptr;  // for what is done while a stream is being recorded
  void* last_stream_ = nullptr;
  std::unique_ptr<Event> last_step_;
  std::deque<std::shared_ptr<Landing>> landings_;
};

class CudaDriver : public device::Driver {
 public:
  int n_devices() override {
    check_process();
    int n = 0;
    const cudaError_t error = cudaGetDeviceCount(&n);
    if (error == cudaErrorNoDevice) n = 0;
    else if (error == cudaErrorInsufficientDriver) throw Error(why_no_driver());
    else check(error, "CUDA does not start");
    if (n == 0) throw Error("there is no NVIDIA GPU on this machine, or none that this process may use");
    return n;
  }

  std::unique_ptr<device::Engine> make_engine(int device) override {
    const int n = n_devices();
    if (device < 0 || device >= n) {
      throw Error("there is no cuda:" + std::to_string(device) + ", there are " + std::to_string(n) + " devices");
    }
    return cuda::make_engine(std::make_unique<Gpu>(device));
  }

  void wait_for(int device, void* stream, void* other) override {
    if (stream == other) return;
    int before = 0;
    check(cudaGetDevice(&before), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
    Event event;
    event.record(static_cast<cudaStream_t>(other));
    event.hold_back(static_cast<cudaStream_t>(stream));
    cudaSetDevice(before);
  }

  std::string describe(int device) override {
    n_devices();
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    int version = 0;
    cudaDriverGetVersion(&version);
    return std::string(properties.name) + ", " + std::to_string(properties.totalGlobalMem >> 30) + " GiB, compute capability " +
           std::to_string(properties.major) + "." + std::to_string(properties.minor) + ", driver for CUDA " + text_of(version);
  }

  int device_of(const void* memory) override {
    n_devices();
    cudaPointerAttributes attributes;
    check(cudaPointerGetAttributes(&attributes, memory), "cudaPointerGetAttributes");
    return attributes.device;
  }

 private:
  static std::string text_of(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

  static std::string why_no_driver() {
    int version = 0;
    cudaDriverGetVersion(&version);
    if (version == 0) return "there is no NVIDIA driver on this machine";
    return "the NVIDIA driver is for CUDA " + text_of(version) + " at most, this build needs one for CUDA " +
           text_of(CUDART_VERSION);
  }

  // CUDA does not live on in a forked process.
  void check_process() {
#if !defined(_WIN32)
    const pid_t here = getpid();
    pid_t first = 0;
    if (!process_.compare_exchange_strong(first, here) && first != here) {
      throw Error("CUDA was used before this process was forked, and can't be used in both: start it by 'spawn'");
    }
#endif
  }

#if !defined(_WIN32)
  std::atomic<pid_t> process_{0};
#endif
};

}  // namespace

device::Driver& driver() {
  static CudaDriver driver;
  return driver;
}

}  // namespace gradstep::cuda
