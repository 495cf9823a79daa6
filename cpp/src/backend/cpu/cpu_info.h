// What the CPU backend runs on, for `tidaldecode info` and for its own choices.
#pragma once

#include <cstdint>
#include <string>

#include "tidal/device.h"

namespace tidal {

// Name "cpu", the processor with instruction set and threads, memory of the machine or the
// container.
DeviceStatus CpuStatus();

// Version and build of OpenBLAS: "0.3.34 DYNAMIC_ARCH ...".
std::string BlasDescription();

struct HostMemory {
  int64_t total_bytes = 0;
  int64_t free_bytes = 0;  // what can be allocated without swapping
};

HostMemory ReadHostMemory();

}  // namespace tidal
