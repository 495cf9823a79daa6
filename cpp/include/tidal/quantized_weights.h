// Quantised matrices of a checkpoint: how their parts are stored, and a source of what they mean.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tidal/dtype.h"
#include "tidal/weights.h"

namespace tidal {

class CopyThreads;
struct DecodedBlocks;
struct StoredRows;

// How the codes of a matrix [out, in] are stored, and its scales and zeros with them.
enum class WeightFormat : int32_t {
  // Bytes [out, in], each a float8 e4m3fn; scales [row blocks, column blocks].
  kFloat8,
  // Bytes [out, in], each a signed integer; scales likewise.
  kInt8,
  // int32 [out, ceil(in / 8)], 8 codes along `in`, the first in the lowest bits; scales likewise,
  // zeros int32 [ceil(out / 8), column blocks], 8 along `out`.
  kInt4Packed,
  // The same of 8 bits: int32 [out, ceil(in / 4)], zeros int32 [ceil(out / 4), column blocks].
  kInt8Packed,
  // int32 [in / 8, out], 8 codes along `in`, the first in the lowest bits; scales [column blocks,
  // out], zeros int32 [column blocks, out / 8], 8 along `out`.
  kInt4Gptq,
  // int32 [in, out / 8], 8 codes along `out`, those of rows 0, 2, 4, 6, 1, 3, 5, 7 from the lowest
  // bits on; scales [column blocks, out], zeros as the codes.
  kInt4Awq,
  // Bytes [out, in / 2], two codes of float4 e2m1 along `in` in each, the first in the lower bits;
  // scales bytes [row blocks, column blocks], each the power of 2 of itself less 127 (OCP MX).
  kMxfp4,
};

// One matrix. Its element (o, i) is (code(o, i) - zero) * scale, the product in float32; scale and
// zero are those of its block.
struct QuantizedWeight {
  std::string name;            // of what the parts mean together: "….weight"
  std::vector<int64_t> shape;  // [out, in]
  WeightFormat format = WeightFormat::kFloat8;
  int64_t block_rows = 1;     // of a block; the last blocks of a matrix may be smaller
  int64_t block_columns = 1;  // of a block; a multiple of 8 or all of them in formats of 4 bits
  WeightFileEntry codes;
  WeightFileEntry scales;  // float32, bfloat16 or float16; uint8 of kMxfp4
  // Those of packed integers, in blocks of one row; absent: the middle, 8 or 128.
  std::optional<WeightFileEntry> zeros;
  int32_t zero_offset = 0;                     // added to every stored zero, modulo 16 or 256
  bool quantizes_inputs = false;               // of kFloat8; see CodedInfo
  std::optional<WeightFileEntry> input_scale;  // one number
  std::string stored_name = {};                // of the matrix, as of a WeightInfo
};

// Tensors in files, the quantised ones decoded to a float type while they are read.
class QuantizedWeightSource final : public WeightSource {
 public:
  // `plain`: the other tensors, shown as they are stored. `dtype`: that of the decoded ones, to
  // which each element is rounded once.
  // Throws WeightsError for parts whose shapes or types do not fit each other.
  QuantizedWeightSource(std::vector<WeightFileEntry> plain, std::vector<QuantizedWeight> quantized,
                        DType dtype);
  ~QuantizedWeightSource() override;
  QuantizedWeightSource(const QuantizedWeightSource&) = delete;
  QuantizedWeightSource& operator=(const QuantizedWeightSource&) = delete;

  const WeightInfo* Find(const std::string& name) const override;

  // Reads whole elements of a quantised tensor. Throws WeightsError also for a scale that is not
  // finite.
  void Read(const std::string& name, int64_t offset, int64_t bytes, void* dst) const override;
  void CheckUnchanged() const override;
  // Finds float8, int4 and MXFP4 in blocks of 32 as they are stored, int4 with its codes along
  // `in`.
  const CodedInfo* FindCodes(const std::string& name) const override;
  void ReadCodes(const std::string& name, int64_t begin, int64_t end,
                 const CodedRows& rows) const override;
  float ReadInputScale(const std::string& name) const override;

 private:
  struct Matrix {
    QuantizedWeight stored;
    WeightInfo info;  // of the decoded tensor
    CodedInfo coded;
  };

  void Open(const Matrix& matrix) const;
  // Into codes_.
  void ReadStored(const QuantizedWeight& weight, int64_t offset, int64_t bytes) const;
  // Those of rows that lie apart, or finds those of the open matrix.
  StoredRows ReadRows(const QuantizedWeight& weight, int64_t begin, int64_t end) const;
  template <typename T>
  void Decode(const QuantizedWeight& weight, int64_t begin, int64_t end, T* dst) const;

  FileWeightSource files_;
  std::unordered_map<std::string, Matrix> matrices_;
  std::unique_ptr<CopyThreads> threads_;

  // The matrix that was read last, for its next piece.
  mutable const Matrix* open_ = nullptr;
  mutable std::unique_ptr<DecodedBlocks> blocks_;
  mutable std::vector<uint32_t> codes_;
};

// The parts of a model that are kept in codes or not, each by itself.
enum class CodedPart : int32_t {
  kLayers,  // all but the output matrix
  kLmHead,
};
inline constexpr const char* kLmHeadName = "lm_head.weight";
inline CodedPart PartOf(const std::string& name) {
  return name == kLmHeadName ? CodedPart::kLmHead : CodedPart::kLayers;
}

// Another source, all of which it gives as that has it.
class WeightSourceOver : public WeightSource {
 public:
  const WeightInfo* Find(const std::string& name) const override { return source_->Find(name); }
  void Read(const std::string& name, int64_t offset, int64_t bytes, void* dst) const override {
    source_->Read(name, offset, bytes, dst);
  }
  const CodedInfo* FindCodes(const std::string& name) const override {
    return source_->FindCodes(name);
  }
  void ReadCodes(const std::string& name, int64_t begin, int64_t end,
                 const CodedRows& rows) const override {
    source_->ReadCodes(name, begin, end, rows);
  }
  float ReadInputScale(const std::string& name) const override {
    return source_->ReadInputScale(name);
  }
  void CheckUnchanged() const override { source_->CheckUnchanged(); }

 protected:
  explicit WeightSourceOver(std::unique_ptr<WeightSource> source) : source_(std::move(source)) {}

  const WeightSource& source() const { return *source_; }

 private:
  std::unique_ptr<WeightSource> source_;
};

// Rounds the matrices of a model's layers, or its output matrix, to codes while they are read: a
// float8 for each number, with a scale for each row (its largest number over 448), or 4 bits, with
// a scale for every 128 inputs (their largest over 7.5, as compressed-tensors rounds), or of
// experts alone float4, with a scale for every 32 (the largest's power of 2 over 4, as OCP MX
// rounds). All else is as the source has it. An output matrix that the source lacks is made of the
// embedding.
class QuantizingWeightSource final : public WeightSourceOver {
 public:
  // Throws InvalidArgument for no codes.
  QuantizingWeightSource(std::unique_ptr<WeightSource> numbers, WeightCodes codes,
                         CodedPart part = CodedPart::kLayers);
  ~QuantizingWeightSource() override;
  QuantizingWeightSource(const QuantizingWeightSource&) = delete;
  QuantizingWeightSource& operator=(const QuantizingWeightSource&) = delete;

  const WeightInfo* Find(const std::string& name) const override;
  // What the codes stand for. Throws WeightsError also for a number that is not finite.
  void Read(const std::string& name, int64_t offset, int64_t bytes, void* dst) const override;
  const CodedInfo* FindCodes(const std::string& name) const override;
  void ReadCodes(const std::string& name, int64_t begin, int64_t end,
                 const CodedRows& rows) const override;

  // Returns the root mean square of what rounding changed, over that of the numbers it rounded.
  double relative_error() const;

 private:
  // Under which name the source has the numbers of a tensor.
  std::string SourceName(const std::string& name) const;
  // As FindCodes, of what is rounded here.
  const CodedInfo* FindRounded(const std::string& name) const;
  std::vector<float> ReadNumbers(const std::string& name, int64_t begin, int64_t end) const;

  WeightCodes codes_;
  CodedPart part_;
  std::unique_ptr<CopyThreads> threads_;
  mutable std::unordered_map<std::string, CodedInfo> infos_;
  mutable double squared_error_ = 0.0, squared_size_ = 0.0;
};

// A source whose matrices of one part are only to be read as numbers.
class DecodedWeightSource final : public WeightSourceOver {
 public:
  DecodedWeightSource(std::unique_ptr<WeightSource> source, CodedPart part)
      : WeightSourceOver(std::move(source)), part_(part) {}

  const CodedInfo* FindCodes(const std::string& name) const override {
    return PartOf(name) == part_ ? nullptr : WeightSourceOver::FindCodes(name);
  }

 private:
  CodedPart part_;
};

// A source all or none of whose matrices in float8 say that they quantizes_inputs.
class ActivationsSource final : public WeightSourceOver {
 public:
  ActivationsSource(std::unique_ptr<WeightSource> source, bool quantizes)
      : WeightSourceOver(std::move(source)), quantizes_(quantizes) {}

  const CodedInfo* FindCodes(const std::string& name) const override {
    const CodedInfo* coded = WeightSourceOver::FindCodes(name);
    if (coded == nullptr || coded->codes != WeightCodes::kFloat8) return coded;
    CodedInfo& info = infos_[name] = *coded;
    info.quantizes_inputs = quantizes_;
    return &info;
  }

 private:
  bool quantizes_;
  mutable std::unordered_map<std::string, CodedInfo> infos_;
};

}  // namespace tidal
