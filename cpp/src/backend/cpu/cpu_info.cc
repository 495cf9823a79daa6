// Reads /proc and the container's limits; where they are missing, says less.
#include "backend/cpu/cpu_info.h"

#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "backend/cpu/cpu_backend.h"

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

int64_t ReadNumber(const char* path, int64_t otherwise) {
  std::ifstream file(path);
  int64_t value = 0;
  return file >> value ? value : otherwise;
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
  // A container's own limit (cgroup v2); "max" does not parse as a number.
  const int64_t limit = ReadNumber("/sys/fs/cgroup/memory.max", memory.total_bytes);
  if (limit < memory.total_bytes) {
    const int64_t used = ReadNumber("/sys/fs/cgroup/memory.current", 0);
    memory.total_bytes = limit;
    memory.free_bytes = std::clamp<int64_t>(limit - used, 0, memory.free_bytes);
  }
  return memory;
}

DeviceStatus CpuStatus() {
  std::string processor = FindLine("/proc/cpuinfo", "model name");
  if (processor.empty()) processor = "CPU";
  const int threads = omp_get_max_threads();
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
