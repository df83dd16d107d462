// What the GPU's engine needs of a device: memory, a way to fill it in the order of a stream, and launches. A GPU has it
// (runtime.cpp), and so has the host, for tests (emulation.cpp).
#pragma once

#include <cstddef>
#include <memory>

#include "tables.h"

namespace gradstep::cuda {

class Device {
 public:
  virtual ~Device() = default;

  // Makes the device the current one, until the object goes.
  class Current {
   public:
    virtual ~Current() = default;
  };
  virtual std::unique_ptr<Current> make_current() = 0;

  virtual void* allocate(std::size_t bytes) = 0;
  virtual void release(void* memory) = 0;  // once all streams have passed what was enqueued before

  // Whether launches on the stream are being recorded, to be replayed.
  virtual bool is_recording(void* stream) = 0;
  // Copies to the device in the order of the stream; `from` may change at once. While the stream is being recorded the copy is
  // made at once instead, and is no part of the recording.
  virtual void upload(void* to, const std::byte* from, std::size_t bytes, void* stream) = 0;
  virtual void launch(const Launch& launch, const Args& args, void* stream) = 0;

  // Makes the stream wait for the step before, if that was on another one; and marks the end of this one.
  virtual void begin_step(void* stream) = 0;
  virtual void end_step(void* stream) = 0;

  // A copy from the device to the host. What it needs is there before it begins, in the order of the stream.
  class Download {
   public:
    virtual ~Download() = default;
    virtual void begin(const void* from, void* stream) = 0;
    virtual bool is_done() = 0;
    virtual const std::byte* wait() = 0;
  };
  virtual std::shared_ptr<Download> make_download(std::size_t bytes) = 0;

  virtual std::uint32_t largest_shared() const = 0;  // bytes of memory that the threads of a block may share
};

// Steps on the device.
std::unique_ptr<device::Engine> make_engine(std::unique_ptr<Device> device);

}  // namespace gradstep::cuda
