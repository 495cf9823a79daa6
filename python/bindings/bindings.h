// One function per file of the module; conversion only.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "tidal/config.h"

namespace tidal {

void RegisterErrors();
void RegisterConfig(pybind11::module_& module);
void RegisterDecoder(pybind11::module_& module);

// Enums travel as strings; an unknown one is a ValueError that lists the known ones.
DType ParseDType(const std::string& name);
Device ParseDevice(const std::string& name);
std::string DeviceString(const Device& device);

}  // namespace tidal
