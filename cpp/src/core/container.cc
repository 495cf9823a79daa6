#include "core/container.h"

#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <initializer_list>
#include <sstream>
#include <thread>
#include <vector>

namespace tidal {
namespace {

// The first number of a file; none if there is no such file or it says "max".
std::optional<int64_t> ReadNumber(const std::string& path) {
  std::ifstream file(path);
  int64_t value = 0;
  if (file >> value) return value;
  return std::nullopt;
}

// The number behind `key` in a file of "key number" lines; 0 if there is none.
int64_t ReadField(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string name;
  for (int64_t value = 0; file >> name >> value;) {
    if (name == key) return value;
  }
  return 0;
}

// The process's group in a hierarchy: "/a/b". An empty controller is version 2's. What is not
// listed is taken for the root: a container may see its own files there and no more.
std::string GroupPath(const std::string& root, const std::string& controller) {
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::stringstream names(line.substr(first + 1, second - first - 1));
    if (controller.empty() && line.compare(0, 3, "0::") == 0) return line.substr(second + 1);
    for (std::string name; std::getline(names, name, ',');) {
      if (name == controller) return line.substr(second + 1);
    }
  }
  return "/";
}

// Where the files of the process's group, and of all groups around it, may lie.
std::vector<std::string> GroupFolders(const std::string& root, const std::string& controller,
                                      std::initializer_list<const char*> mounts) {
  std::vector<std::string> folders;
  for (const char* mount : mounts) {
    const std::string top = root + mount;
    std::string path = GroupPath(root, controller);
    while (!path.empty() && path != "/") {
      folders.push_back(top + path);
      path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
    }
    folders.push_back(top);
  }
  return folders;
}

constexpr std::initializer_list<const char*> kUnified = {"/sys/fs/cgroup",
                                                         "/sys/fs/cgroup/unified"};

struct MemoryFiles {
  const char* limit;
  const char* used;
  const char* inactive;  // field of memory.stat
};

// Takes the limit of a group into `memory`, if it has one.
void Narrow(const std::string& folder, const MemoryFiles& files,
            std::optional<ContainerMemory>& memory) {
  // Without a limit version 1 shows the largest multiple of a page.
  constexpr int64_t kNoLimit = int64_t{1} << 60;
  std::optional<int64_t> limit = ReadNumber(folder + files.limit);
  if (!limit || *limit >= kNoLimit) return;
  int64_t used = ReadNumber(folder + files.used).value_or(0);
  used -= std::min(used, ReadField(folder + "/memory.stat", files.inactive));
  int64_t free_bytes = std::max<int64_t>(*limit - used, 0);
  if (!memory) memory = {*limit, free_bytes};
  memory->total_bytes = std::min(memory->total_bytes, *limit);
  memory->free_bytes = std::min(memory->free_bytes, free_bytes);
}

void NarrowQuota(std::optional<int64_t> quota, std::optional<int64_t> period,
                 std::optional<int>& processors) {
  if (!quota || !period || *quota <= 0 || *period <= 0) return;
  int64_t whole = std::clamp<int64_t>((*quota - 1) / *period + 1, 1, 1 << 20);
  processors = std::min(processors.value_or(1 << 20), static_cast<int>(whole));
}

int NumUsableProcessors() {
  cpu_set_t usable;
  CPU_ZERO(&usable);
  if (sched_getaffinity(0, sizeof(usable), &usable) == 0) return std::max(CPU_COUNT(&usable), 1);
  return std::max(static_cast<int>(std::thread::hardware_concurrency()), 1);
}

}  // namespace

std::optional<ContainerMemory> ReadContainerMemory(const std::string& root) {
  std::optional<ContainerMemory> memory;
  for (const std::string& folder : GroupFolders(root, "", kUnified)) {
    Narrow(folder, {"/memory.max", "/memory.current", "inactive_file"}, memory);
  }
  for (const std::string& folder : GroupFolders(root, "memory", {"/sys/fs/cgroup/memory"})) {
    Narrow(folder, {"/memory.limit_in_bytes", "/memory.usage_in_bytes", "total_inactive_file"},
           memory);
  }
  return memory;
}

std::optional<int> ReadProcessorQuota(const std::string& root) {
  std::optional<int> processors;
  for (const std::string& folder : GroupFolders(root, "", kUnified)) {
    std::ifstream file(folder + "/cpu.max");
    int64_t quota = 0, period = 0;
    if (file >> quota >> period) NarrowQuota(quota, period, processors);
  }
  for (const std::string& folder :
       GroupFolders(root, "cpu", {"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"})) {
    NarrowQuota(ReadNumber(folder + "/cpu.cfs_quota_us"), ReadNumber(folder + "/cpu.cfs_period_us"),
                processors);
  }
  return processors;
}

int DefaultNumThreads() {
  if (const char* asked = std::getenv("OMP_NUM_THREADS")) {
    constexpr long kMost = 4096;
    long count = std::strtol(asked, nullptr, 10);  // of "4,2" the outer level
    if (count >= 1) return static_cast<int>(std::min(count, kMost));
  }
  return std::min(NumUsableProcessors(), ReadProcessorQuota().value_or(1 << 20));
}

}  // namespace tidal
