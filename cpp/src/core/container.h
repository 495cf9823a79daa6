// What a container leaves of the machine: memory limits and processor quotas of control groups
// (cgroups), versions 1 and 2.
//
// Source: the Linux kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst,
// scheduler/sched-bwc.rst. The functions read files below `root`, "" being the machine itself.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace tidal {

struct ContainerMemory {
  int64_t total_bytes = 0;  // the smallest limit of the process's group and those around it
  int64_t free_bytes = 0;   // up to the nearest limit; file cache that can be dropped is free
};

// Reads the limits that hold for this process; none if there is no limit.
std::optional<ContainerMemory> ReadContainerMemory(const std::string& root = "");

// Reads how many processors' time the process may use, at least 1 and rounded up; none if there is
// no quota.
std::optional<int> ReadProcessorQuota(const std::string& root = "");

// Says how many threads compute where nobody gave a number: OMP_NUM_THREADS, else as many as the
// processors this process may run on, within its quota.
int DefaultNumThreads();

}  // namespace tidal
