// Shapes of tensors in files: how many elements, and how a message shows one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tidal {

inline int64_t NumElements(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return count;
}

// "[2, 3]".
inline std::string ShapeString(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace tidal
