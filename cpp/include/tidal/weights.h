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

// The codes in which a matrix is kept, by products that can read them.
enum class WeightCodes : int32_t {
  kNone,    // none: numbers of a float type
  kFloat8,  // a byte each: float8 e4m3fn
  kInt4,    // half a byte each, unsigned; the first of two in the lower bits
  kMxfp4,   // likewise, float4 e2m1; 32 share a scale that is a power of 2
};

// Returns the size of one code.
constexpr int64_t CodeBits(WeightCodes codes) {
  return codes == WeightCodes::kFloat8 ? 8 : 4;
}

struct WeightInfo {
  // float32, bfloat16 or float16; of stored codes int32 or uint8.
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;
  std::string stored_name = {};  // in its file, where that is another; for messages

  // What messages call the tensor that the engine calls `name`.
  std::string NameToShow(const std::string& name) const;
};

// How a matrix can be had in codes: element (n, k) is (code - zero) * scale, with the scale and the
// zero of row n and group k / group_size; a zero is 8 of kInt4 without zeros, 0 of the other codes.
struct CodedInfo {
  WeightCodes codes = WeightCodes::kNone;
  int64_t group_size = 0;  // at most the row's length
  // That holds every scale exactly; uint8 of kMxfp4, each the power of 2 of itself less 127.
  DType scale_dtype = DType::kFloat32;
  bool has_zeros = false;
  // In kFloat8: whether products of prompts are to round their inputs to float8 too.
  bool quantizes_inputs = false;

  bool HasSameCodes(const CodedInfo& other) const {
    return codes == other.codes && group_size == other.group_size &&
           scale_dtype == other.scale_dtype && has_zeros == other.has_zeros;
  }

  // Both for a row of so many elements.
  int64_t num_groups(int64_t inputs) const { return (inputs + group_size - 1) / group_size; }
  int64_t row_bytes(int64_t inputs) const { return inputs * CodeBits(codes) / 8; }
};

// Where rows of a matrix in codes go.
struct CodedRows {
  void* codes;     // [rows, K] of kFloat8, else [rows, K / 2]
  float* scales;   // [rows, groups]
  uint8_t* zeros;  // likewise; nullptr unless has_zeros
};

class WeightSource {
 public:
  virtual ~WeightSource() = default;

  // nullptr if there is no such tensor.
  virtual const WeightInfo* Find(const std::string& name) const = 0;

  // Reads `bytes` bytes of the tensor's row-major data, from byte `offset` on, into `dst`.
  // Throws WeightsError if they cannot be read. Callable from one thread at a time.
  virtual void Read(const std::string& name, int64_t offset, int64_t bytes, void* dst) const = 0;

  // How a tensor's codes can be read; nullptr: only its numbers can. What both give is the same.
  virtual const CodedInfo* FindCodes(const std::string&) const { return nullptr; }

  // Reads rows [begin, end) of a tensor that FindCodes knows. Throws WeightsError as Read does, and
  // for a code that stands for no number.
  virtual void ReadCodes(const std::string& name, int64_t begin, int64_t end,
                         const CodedRows& rows) const;

  // The scale of the inputs of a tensor's products, where it quantizes_inputs; 0: they have scales
  // of their own. Throws WeightsError as Read does, and for a scale that is none.
  virtual float ReadInputScale(const std::string&) const { return 0.0f; }

  // Called after the last Read. Throws WeightsError if what was read is not what was described.
  virtual void CheckUnchanged() const {}
};

// Reads all numbers of a tensor, row-major. Throws WeightsError as Read does, and for a tensor of
// another type.
void ReadNumbers(const WeightSource& source, const std::string& name, float* numbers);

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
  // Elements from one to the next along each of its one or two dimensions, where it is part of
  // another tensor or a transposed one; empty: they lie one behind the other.
  std::vector<int64_t> strides = {};
};

// Tensors in files, read with pread. A file that was cut short, replaced or changed since its
// header was read is a WeightsError. Of a tensor with strides all bytes from its first element to
// its last are in memory from one piece to the next.
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
  void ReadBytes(const WeightFileEntry& entry, int64_t offset, int64_t bytes, void* dst) const;
  void ReadStrided(const WeightFileEntry& entry, int64_t offset, int64_t bytes, void* dst) const;

  std::unordered_map<std::string, WeightFileEntry> entries_;
  mutable std::unordered_map<std::string, OpenFile> open_files_;
  mutable const WeightFileEntry* span_of_ = nullptr;  // with strides, that was read last
  mutable std::vector<char> span_;
  std::unique_ptr<CopyThreads> threads_;
};

// Random weights of every shape a config asks for: a model that runs like the real one and says
// nothing, for measuring speed without its files. Normal values of standard deviation 0.02, norms
// around 1; equal arguments give equal weights.
class RandomWeightSource final : public WeightSource {
 public:
  // `dtype`: best the one the decoder computes with, which spares a conversion. `codes`: those that
  // the matrices of the layers can be had in, random ones of as large numbers.
  // Throws ConfigError for an impossible model, InvalidArgument for a dtype of no weights.
  RandomWeightSource(const ModelConfig& model, DType dtype, uint64_t seed = 0,
                     WeightCodes codes = WeightCodes::kNone);
  ~RandomWeightSource() override;
  RandomWeightSource(const RandomWeightSource&) = delete;
  RandomWeightSource& operator=(const RandomWeightSource&) = delete;

  const WeightInfo* Find(const std::string& name) const override;
  void Read(const std::string& name, int64_t offset, int64_t bytes, void* dst) const override;
  const CodedInfo* FindCodes(const std::string& name) const override;
  void ReadCodes(const std::string& name, int64_t begin, int64_t end,
                 const CodedRows& rows) const override;

 private:
  struct Tensor {
    WeightInfo info;
    bool is_norm = false;
    int64_t offset = 0;  // bytes into the noise
    CodedInfo coded = {};
  };

  const Noise& NoiseOf(const Tensor& tensor) const;

  DType dtype_;
  uint64_t seed_;
  WeightCodes codes_;
  int64_t norm_elements_;  // of the longest

  // Made when they are first read: a plan of memory asks for shapes alone.
  mutable std::unique_ptr<Noise> noise_;  // of matrices and biases
  mutable std::unique_ptr<Noise> norms_;
  mutable std::vector<uint8_t> random_codes_;  // repeated
  std::unordered_map<std::string, Tensor> tensors_;
  std::unique_ptr<CopyThreads> threads_;
};

}  // namespace tidal
