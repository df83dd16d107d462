// Arrays in a device's memory.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "device.h"

namespace gradstep::cuda {

// An array in the device's memory that the host writes: what has not changed since the last time is not sent again.
class Sent {
 public:
  // Where `n` elements will stand.
  template <class X>
  const X* room(Device& device, std::size_t n) {
    const std::size_t size = n * sizeof(X);
    if (size > room_) {
      if (memory_) device.release(memory_);
      memory_ = nullptr;
      room_ = 0;
      last_.clear();
      memory_ = device.allocate(size + size / 4);
      room_ = size + size / 4;
    }
    return static_cast<const X*>(memory_);
  }

  template <class X>
  const X* send(Device& device, const std::vector<X>& now, void* stream) {
    static_assert(std::is_trivially_copyable_v<X> && sizeof(X) % sizeof(std::uint64_t) == 0);
    const auto* bytes = reinterpret_cast<const std::byte*>(now.data());
    const std::size_t size = now.size() * sizeof(X);
    room<X>(device, now.size());
    // In pieces of whole elements; those that changed go together with what lies between them, if that is little.
    constexpr std::size_t kGap = 2048 / sizeof(X);
    const auto differs = [&](std::size_t i) {
      const std::size_t at = i * sizeof(X);
      return at + sizeof(X) > last_.size() || std::memcmp(last_.data() + at, bytes + at, sizeof(X)) != 0;
    };
    if (last_.size() != size || (size > 0 && std::memcmp(last_.data(), bytes, size) != 0)) {
      for (std::size_t i = 0; i < now.size();) {
        if (!differs(i)) {
          ++i;
          continue;
        }
        std::size_t end = i + 1;
        for (std::size_t k = end; k < now.size() && k <= end + kGap; ++k) {
          if (differs(k)) end = k + 1;
        }
        device.upload(static_cast<std::byte*>(memory_) + i * sizeof(X), bytes + i * sizeof(X), (end - i) * sizeof(X), stream);
        i = end;
      }
      last_.assign(bytes, bytes + size);
    }
    return static_cast<const X*>(memory_);
  }

  void release(Device& device) {
    if (memory_) device.release(memory_);
    memory_ = nullptr;
  }

 private:
  void* memory_ = nullptr;
  std::size_t room_ = 0;
  std::vector<std::byte> last_;
};

// Memory that only the device writes.
class Own {
 public:
  template <class X>
  X* get(Device& device, std::size_t n) {
    if (n * sizeof(X) > room_) {
      if (memory_) device.release(memory_);
      memory_ = nullptr;
      room_ = 0;
      memory_ = device.allocate(n * sizeof(X) * 5 / 4);
      room_ = n * sizeof(X) * 5 / 4;
    }
    return static_cast<X*>(memory_);
  }

  void release(Device& device) {
    if (memory_) device.release(memory_);
    memory_ = nullptr;
  }

 private:
  void* memory_ = nullptr;
  std::size_t room_ = 0;
};

}  // namespace gradstep::cuda
