// DeviceTensors: tensors of a backend that live as long as this object, for whoever plans memory.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "core/checked.h"

namespace tidal {

class DeviceTensors {
 public:
  // `what` names their purpose in an OutOfMemoryError.
  DeviceTensors(Backend& backend, std::string what) : backend_(backend), what_(std::move(what)) {}

  // Zero-filled; its address never changes.
  TensorView Make(DType dtype, std::initializer_list<int64_t> shape) {
    TensorView view(nullptr, dtype, shape);
    buffers_.push_back(backend_.Allocate(Product({Product(shape), DTypeBytes(dtype)}), what_));
    view.ptr = buffers_.back().data();
    return view;
  }

  int64_t bytes() const {
    int64_t total = 0;
    for (const Buffer& buffer : buffers_) total += buffer.bytes();
    return total;
  }

 private:
  Backend& backend_;
  std::string what_;
  std::vector<Buffer> buffers_;
};

}  // namespace tidal
