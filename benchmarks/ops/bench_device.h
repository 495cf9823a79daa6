// One device of bench_ops: its memory of random data and its clock.
#pragma once

#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "core/noise.h"

namespace tidal {

inline constexpr int64_t kHeadDim = 128;
inline constexpr int64_t kPageSize = 64;
inline constexpr DType kDType = DType::kBFloat16;
inline constexpr double kBytesPerReplay = 1.5e9;  // many times any L2
// Llama-3.1-8B.
inline constexpr int64_t kHidden = 4096, kIntermediate = 14336, kQHeads = 32, kKvHeads = 8;
inline constexpr int64_t kVocab = 128256;

class BenchDevice {
 public:
  BenchDevice(const BackendOptions& options, int samples);

  Backend& backend() { return *backend_; }
  int samples() const { return samples_; }  // of which a time is the median

  // The first line of the output: what the rows were measured on.
  void Report() const;

  // Frees all tensors.
  void Clear() { buffers_.clear(); }
  TensorView Tensor(DType dtype, std::initializer_list<int64_t> shape);
  TensorView Ints(const std::vector<int32_t>& values, std::initializer_list<int64_t> shape);
  // A page_table [rows, pages_per_row] of different pages in random order.
  TensorView PageTable(int64_t rows, int64_t pages_per_row);
  // Random normal values; a block of them repeated, since generation is slower than the device.
  TensorView Random(DType dtype, std::initializer_list<int64_t> shape);
  TensorView RandomHalf(std::initializer_list<int64_t> shape) { return Random(kDType, shape); }

  // Microseconds of one of the ops that `step` queues, recorded and replayed.
  double TimeOfStep(const std::function<void()>& step, int64_t ops_per_step);

  // Microseconds of one call of `work`, `repeats` of them queued back to back.
  double MedianTime(const std::function<void()>& work, int repeats);

 private:
  void Wait();

  int samples_;
  std::unique_ptr<Backend> backend_;
  std::vector<Buffer> buffers_;
  std::map<DType, Noise> noise_;
  int64_t step_id_ = 0;
};

}  // namespace tidal
