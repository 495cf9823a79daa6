// Where weights come from: named tensors that can be read piece by piece.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "tidal/config.h"
#include "tidal/dtype.h"

namespace tidal {

class CopyThreads;
class Noise;

// Told of the bytes that are on the device, of all that will be.
using LoadProgress = std::function<void(int64_t bytes_done, int64_t bytes_total)>;

struct WeightInfo {
  DType dtype = DType::kFloat32;  // float32, bfloat16 or float16
  std::vector<int64_t> shape;
};

class WeightSource {
 public:
  virtual ~WeightSource() = default;

  // nullptr if there is no such tensor.
  virtual const WeightInfo* Find(const std::string& name) const = 0;

  // Reads `bytes` bytes of the tensor's row-major data, from byte `offset` on, into `dst`.
  // Throws WeightsError if they cannot be read. Callable from one thread at a time.
  virtual void Read(const std::string& name, int64_t offset, int64_t bytes, void* dst) const = 0;

  // Called after the last Read. Throws WeightsError if what was read is not what was described.
  virtual void CheckUnchanged() const {}
};

// What tells one state of a file from another, as fstat() gives it.
struct FileIdentity {
  uint64_t device = 0;
  uint64_t inode = 0;
  int64_t size = 0;      // bytes
  int64_t mtime_ns = 0;  // of the last change, since 1970
  bool operator==(const FileIdentity&) const = default;
};

// One tensor inside a file: the part of a safetensors header that the engine needs.
struct WeightFileEntry {
  std::string name;
  WeightInfo info;
  std::string path;
  int64_t file_offset = 0;  // of the tensor's first byte, from the start of the file
  FileIdentity identity;    // of the file when its header was read
};

// Tensors in files, read with pread. A file that was cut short, replaced or changed since its
// header was read is a WeightsError.
class FileWeightSource final : public WeightSource {
 public:
  explicit FileWeightSource(std::vector<WeightFileEntry> entries);
  ~FileWeightSource() override;
  FileWeightSource(const FileWeightSource&) = delete;
  FileWeightSource& operator=(const FileWeightSource&) = delete;

  const WeightInfo* Find(const std::string& name) const override;
  void Read(const std::string& name, int64_t offset, int64_t bytes, void* dst) const override;
  void CheckUnchanged() const override;

 private:
  struct OpenFile {
    int descriptor;
    FileIdentity identity;
  };

  int FileDescriptor(const WeightFileEntry& entry) const;

  std::unordered_map<std::string, WeightFileEntry> entries_;
  mutable std::unordered_map<std::string, OpenFile> open_files_;
  std::unique_ptr<CopyThreads> threads_;
};

// Random weights of every shape a config asks for: a model that runs like the real one and says
// nothing, for measuring speed without its files. Normal values of standard deviation 0.02, norms
// around 1; equal arguments give equal weights.
class RandomWeightSource final : public WeightSource {
 public:
  // `dtype`: best the one the decoder computes with, which spares a conversion.
  // Throws ConfigError for an impossible model, InvalidArgument for a dtype of no weights.
  RandomWeightSource(const ModelConfig& model, DType dtype, uint64_t seed = 0);
  ~RandomWeightSource() override;
  RandomWeightSource(const RandomWeightSource&) = delete;
  RandomWeightSource& operator=(const RandomWeightSource&) = delete;

  const WeightInfo* Find(const std::string& name) const override;
  void Read(const std::string& name, int64_t offset, int64_t bytes, void* dst) const override;

 private:
  struct Tensor {
    WeightInfo info;
    const Noise* values = nullptr;
    int64_t offset = 0;  // bytes into the noise
  };

  std::unique_ptr<Noise> noise_;  // of matrices and biases
  std::unique_ptr<Noise> norms_;
  std::unordered_map<std::string, Tensor> tensors_;
  std::unique_ptr<CopyThreads> threads_;
};

}  // namespace tidal
