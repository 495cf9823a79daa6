// Reads /proc and the container's limits; where they are missing, says less.
#include "backend/cpu/cpu_info.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "backend/cpu/cpu_backend.h"
#include "core/container.h"

namespace tidal {
namespace {

// The value of "key : value" in a file of such lines; empty if there is none.
std::string FindLine(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, key.size(), key) != 0) continue;
    size_t begin = line.find_first_not_of(" \t:", key.size());
    return begin == std::string::npos ? std::string() : line.substr(begin);
  }
  return std::string();
}

int64_t MemInfoBytes(const std::string& key) {
  std::string kibibytes = FindLine("/proc/meminfo", key);
  return kibibytes.empty() ? 0 : std::strtoll(kibibytes.c_str(), nullptr, 10) * 1024;
}

}  // namespace

HostMemory ReadHostMemory() {
  HostMemory memory;
  memory.total_bytes = MemInfoBytes("MemTotal");
  memory.free_bytes = MemInfoBytes("MemAvailable");
  if (memory.total_bytes == 0) {
    memory.total_bytes = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
    memory.free_bytes = memory.total_bytes;
  }
  if (const std::optional<ContainerMemory> container = ReadContainerMemory()) {
    memory.total_bytes = std::min(memory.total_bytes, container->total_bytes);
    memory.free_bytes = std::min(memory.free_bytes, container->free_bytes);
  }
  return memory;
}

DeviceStatus CpuStatus() {
  std::string processor = FindLine("/proc/cpuinfo", "model name");
  if (processor.empty()) processor = "CPU";
  const int threads = DefaultNumThreads();
  const HostMemory memory = ReadHostMemory();
  DeviceStatus status;
  status.name = "cpu";
  status.hardware = processor + " (" + SelectKernels(CpuIsa::kAuto).name + ", " +
                    std::to_string(threads) + (threads == 1 ? " thread)" : " threads)");
  status.available = true;
  status.memory_bytes = memory.total_bytes;
  status.free_bytes = memory.free_bytes;
  return status;
}

}  // namespace tidal
