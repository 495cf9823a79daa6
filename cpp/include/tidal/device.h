// The devices of a machine, which of them is meant, and what this build is made of.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace tidal {

enum class DeviceType : int32_t { kCpu, kCuda };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int32_t index = 0;
};

// A device the engine can (or could) run on, and why not.
struct DeviceStatus {
  std::string name;      // "cpu", "cuda:0"
  std::string hardware;  // processor or GPU name; for the CPU its instruction set
  bool available = false;
  std::string reason;  // why it is not available
  int64_t memory_bytes = 0;
  int64_t free_bytes = 0;
};

// CPU first, then every CUDA device, or one unavailable "cuda" entry that says why. Throws
// BackendError for a CUDA library of another version.
std::vector<DeviceStatus> ListDevices();

// Libraries compiled in or found: {"OpenBLAS", "0.3.34 ..."}, {"cuBLASLt", "13.0"}.
std::vector<std::pair<std::string, std::string>> ListLibraries();

const char* VersionString();

}  // namespace tidal
