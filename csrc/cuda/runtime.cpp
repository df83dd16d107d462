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

constexpr int kLeastDriver = 12010;  // of CUDA: launches take tables as arguments
constexpr int kLeastMajor = 8;  // of a compute capability: the oldest that there is code for

// Throws what CUDA reports. An error of a launch is taken off CUDA's own record, so that nobody else finds it there.
void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw Error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Of a call whose failure changes nothing: nobody shall find its error later.
void ignore(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
}

// Allows what is unsafe while any stream is being recorded, as long as it lives: what we do meanwhile is no part of a
// recording.
class Relaxed {
 public:
  Relaxed() { ignore(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~Relaxed() { ignore(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

class Event {
 public:
  Event() {
    const Relaxed relaxed;
    check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreate");
  }
  ~Event() {
    const Relaxed relaxed;
    ignore(cudaEventDestroy(event_));
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  void hold_back(cudaStream_t stream) const { check(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent"); }
  bool is_done() const {
    const Relaxed relaxed;
    const cudaError_t error = cudaEventQuery(event_);
    if (error == cudaErrorNotReady) {
      cudaGetLastError();
      return false;
    }
    check(error, "a step on the device failed");
    return true;
  }
  void wait() const {
    const Relaxed relaxed;
    check(cudaEventSynchronize(event_), "a step on the device failed");
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// Makes a device the current one of this thread, as long as it lives.
class Switched {
 public:
  explicit Switched(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ == device) before_ = -1;
    else check(cudaSetDevice(device), "cudaSetDevice");
  }
  // Back to a device that nobody uses would begin to use it, with hundreds of megabytes.
  ~Switched() {
    if (before_ >= 0 && is_in_use(before_)) ignore(cudaSetDevice(before_));
  }
  Switched(const Switched&) = delete;
  Switched& operator=(const Switched&) = delete;

 private:
  static bool is_in_use(int device) {
    using GetState = int (*)(int device, unsigned* flags, int* active);
    static const auto get_state = [] {
      void* function = nullptr;
      cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
      ignore(cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &function, 12000, cudaEnableDefault, &found));
#else
      ignore(cudaGetDriverEntryPoint("cuDevicePrimaryCtxGetState", &function, cudaEnableDefault, &found));
#endif
      return reinterpret_cast<GetState>(function);
    }();
    unsigned flags = 0;
    int active = 1;
    if (get_state && get_state(device, &flags, &active) != 0) return true;
    return active != 0;
  }

  int before_ = -1;
};

// Memory of the host that a device copies to, used again when a copy has been made and nobody looks at it.
struct Landing {
  std::byte* memory = nullptr;
  std::size_t room = 0;
  Event landed;

  explicit Landing(std::size_t bytes) : room(bytes) {
    const Relaxed relaxed;
    check(cudaMallocHost(reinterpret_cast<void**>(&memory), bytes), "cudaMallocHost");
  }
  ~Landing() {
    const Relaxed relaxed;
    ignore(cudaFreeHost(memory));
  }
  Landing(const Landing&) = delete;
  Landing& operator=(const Landing&) = delete;
};

class Gpu : public Device {
 public:
  explicit Gpu(int index) : index_(index) {
    const auto current = make_current();
    const Relaxed relaxed;
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
    if (aside_) ignore(cudaStreamDestroy(aside_));
  }

  std::unique_ptr<Current> make_current() override {
    struct Here : Current {
      explicit Here(int device) : switched(device) {}
      Switched switched;
    };
    return std::make_unique<Here>(index_);
  }

  void* allocate(std::size_t bytes) override {
    const Relaxed relaxed;
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), "cudaMalloc");
    return memory;
  }
  void release(void* memory) override {
    const Relaxed relaxed;
    ignore(cudaFree(memory));  // waits for the device
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

  // The tables are those of the step before: it has to be done with them. Streams of one name need not be one stream.
  void begin_step(void* stream) override { last_step_->hold_back(static_cast<cudaStream_t>(stream)); }
  void end_step(void* stream) override { last_step_->record(static_cast<cudaStream_t>(stream)); }

  std::shared_ptr<Download> make_download(std::size_t bytes) override {
    class Copy : public Download {
     public:
      Copy(std::shared_ptr<Landing> landing, std::size_t bytes, int device)
          : landing_(std::move(landing)), bytes_(bytes), device_(device) {}
      void begin(const void* from, void* stream) override {
        const auto on = static_cast<cudaStream_t>(stream);
        check(cudaMemcpyAsync(landing_->memory, from, bytes_, cudaMemcpyDeviceToHost, on), "cudaMemcpyAsync");
        landing_->landed.record(on);
      }
      bool is_done() override {
        const Switched switched(device_);
        return landing_->landed.is_done();
      }
      const std::byte* wait() override {
        const Switched switched(device_);
        landing_->landed.wait();
        return landing_->memory;
      }

     private:
      std::shared_ptr<Landing> landing_;
      std::size_t bytes_;
      int device_;
    };
    return std::make_shared<Copy>(free_landing(bytes), bytes, index_);
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
    int version = 0;
    if (cudaDriverGetVersion(&version) == cudaSuccess && version < kLeastDriver) throw Error(why_no_driver());
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
    const Switched switched(device);
    const auto is_recorded = [](void* one) {
      cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
      check(cudaStreamIsCapturing(static_cast<cudaStream_t>(one), &status), "cudaStreamIsCapturing");
      return status != cudaStreamCaptureStatusNone;
    };
    if (is_recorded(stream) != is_recorded(other)) {
      throw Error("a stream that is captured in a CUDA graph can't wait for one that is not: give all arrays to one stream");
    }
    Event event;
    event.record(static_cast<cudaStream_t>(other));
    event.hold_back(static_cast<cudaStream_t>(stream));
  }

  std::string describe(int device) override {
    n_devices();
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    int version = 0;
    ignore(cudaDriverGetVersion(&version));
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
    ignore(cudaDriverGetVersion(&version));
    if (version == 0) return "there is no NVIDIA driver on this machine";
    return "the NVIDIA driver is for CUDA " + text_of(version) + " at most, this build needs one for CUDA " +
           text_of(std::max(kLeastDriver, CUDART_VERSION / 1000 * 1000));
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
