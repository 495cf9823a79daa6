// Sanity of a ModelConfig, whoever filled it in.
#pragma once

#include "tidal/config.h"

namespace tidal {

// Throws ConfigError naming the field that is out of range or contradicts another.
void ValidateModelConfig(const ModelConfig& model);

}  // namespace tidal
