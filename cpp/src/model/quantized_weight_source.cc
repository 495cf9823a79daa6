// QuantizedWeightSource: reads the stored parts of a matrix and decodes them, a piece on several
// threads. At most one matrix's codes are in memory, and only of formats whose rows interleave.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "core/convert.h"
#include "core/float16.h"
#include "core/mxfp4.h"
#include "core/parallel.h"
#include "core/shape.h"
#include "model/weight_format.h"
#include "tidal/error.h"
#include "tidal/quantized_weights.h"

namespace tidal {
namespace {

// What one thread decodes at a time: enough to be worth the call, few enough that all threads have
// some.
constexpr int64_t kDecodeElements = 1 << 18;

std::string BlockString(const QuantizedWeight& weight) {
  return Concat(weight.name, " is ", ShapeString(weight.shape), ", with a scale for every ",
                weight.block_rows, " x ", weight.block_columns, " elements");
}

void CheckShape(const QuantizedWeight& weight, const WeightFileEntry& part,
                const std::vector<int64_t>& expected) {
  TIDAL_CHECK(part.info.shape == expected, WeightsError, part.name, ": shape ",
              ShapeString(part.info.shape), ", expected ", ShapeString(expected), " (",
              BlockString(weight),
              "); the weights and quantization_config in config.json do not belong together");
}

// Whether a shape is `expected` without dimensions that are 1, as writers shorten it.
bool IsVectorOf(const std::vector<int64_t>& shape, const std::vector<int64_t>& expected) {
  if (NumElements(expected) == 1) {
    return std::all_of(shape.begin(), shape.end(), [](int64_t size) { return size == 1; });
  }
  return (expected[0] == 1 || expected[1] == 1) &&
         shape == std::vector<int64_t>{NumElements(expected)};
}

void CheckDType(const WeightFileEntry& part, DType expected) {
  TIDAL_CHECK(part.info.dtype == expected, WeightsError, part.name, ": dtype ",
              DTypeName(part.info.dtype), ", expected ", DTypeName(expected));
}

void CheckMatrix(const QuantizedWeight& weight) {
  TIDAL_CHECK(weight.shape.size() == 2 && weight.shape[0] > 0 && weight.shape[1] > 0, WeightsError,
              weight.name, ": shape ", ShapeString(weight.shape), ", expected a matrix");
  TIDAL_CHECK(weight.block_rows > 0 && weight.block_columns > 0, WeightsError, weight.name,
              ": blocks of ", weight.block_rows, " x ", weight.block_columns,
              ", expected positive sizes");
}

void CheckScales(const QuantizedWeight& weight, const std::vector<int64_t>& expected) {
  if (!IsVectorOf(weight.scales.info.shape, expected)) {
    CheckShape(weight, weight.scales, expected);
  }
  if (weight.format == WeightFormat::kMxfp4) return CheckDType(weight.scales, DType::kUInt8);
  const DType dtype = weight.scales.info.dtype;
  TIDAL_CHECK(dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16,
              WeightsError, weight.scales.name, ": dtype ", DTypeName(dtype),
              ", expected float32, bfloat16 or float16");
}

void CheckParts(const QuantizedWeight& weight) {
  const bool is_bytes =
      weight.format == WeightFormat::kFloat8 || weight.format == WeightFormat::kInt8;
  const bool is_mxfp4 = weight.format == WeightFormat::kMxfp4;
  const bool is_int8 = weight.format == WeightFormat::kInt8Packed;
  const PartShapes expected = ExpectedParts(weight);
  CheckShape(weight, weight.codes, expected.codes);
  CheckDType(weight.codes, is_bytes || is_mxfp4 ? DType::kUInt8 : DType::kInt32);
  TIDAL_CHECK(!is_mxfp4 || weight.shape[1] % 8 == 0, WeightsError, weight.name, ": ",
              weight.shape[1], " columns, expected a multiple of 8");
  TIDAL_CHECK(is_bytes || is_int8 || weight.block_columns % 8 == 0 ||
                  weight.block_columns == weight.shape[1],
              WeightsError, weight.name, ": groups of ", weight.block_columns,
              " columns, expected a multiple of 8");
  CheckScales(weight, expected.scales);
  if (!weight.zeros) return;
  TIDAL_CHECK(!is_bytes && !is_mxfp4 && weight.block_rows == 1, WeightsError, weight.zeros->name,
              ": zero points of this format are not supported");
  CheckShape(weight, *weight.zeros, expected.zeros);
  CheckDType(*weight.zeros, DType::kInt32);
}

// All tensors that are read from files.
std::vector<WeightFileEntry> AllEntries(std::vector<WeightFileEntry> entries,
                                        const std::vector<QuantizedWeight>& quantized) {
  for (const QuantizedWeight& weight : quantized) {
    entries.push_back(weight.codes);
    entries.push_back(weight.scales);
    if (weight.zeros) entries.push_back(*weight.zeros);
    if (weight.input_scale) entries.push_back(*weight.input_scale);
  }
  return entries;
}

std::vector<float> ReadScales(const FileWeightSource& files, const WeightFileEntry& entry) {
  const int64_t count = NumElements(entry.info.shape);
  std::vector<char> data(static_cast<size_t>(count * DTypeBytes(entry.info.dtype)));
  files.Read(entry.name, 0, static_cast<int64_t>(data.size()), data.data());
  std::vector<float> scales(static_cast<size_t>(count));
  if (entry.info.dtype == DType::kUInt8) {
    for (size_t i = 0; i < scales.size(); ++i)
      scales[i] = E8m0ToFloat(static_cast<uint8_t>(data[i]));
  } else {
    ConvertNumbers({data.data(), entry.info.dtype}, {scales.data(), DType::kFloat32}, count);
  }
  for (float scale : scales) {
    TIDAL_CHECK(std::isfinite(scale), WeightsError, entry.name, ": holds ", scale,
                ", expected finite scales; is ", entry.path, " damaged?");
  }
  return scales;
}

// kNone for what is only decoded.
CodedInfo CodedInfoOf(const QuantizedWeight& weight) {
  if (weight.format == WeightFormat::kInt8 || weight.format == WeightFormat::kInt8Packed) return {};
  CodedInfo coded = {.group_size = weight.block_columns,
                     .scale_dtype = weight.scales.info.dtype,
                     .has_zeros = weight.zeros.has_value(),
                     .quantizes_inputs = weight.quantizes_inputs};
  if (weight.format == WeightFormat::kFloat8) {
    coded.codes = WeightCodes::kFloat8;
  } else if (weight.format == WeightFormat::kMxfp4) {
    const bool is_of_rows = weight.block_rows == 1 && weight.block_columns == kMxfp4Group;
    if (is_of_rows) coded.codes = WeightCodes::kMxfp4;
  } else if (weight.shape[1] % 8 == 0) {
    coded.codes = WeightCodes::kInt4;
  }
  return coded;
}

}  // namespace

QuantizedWeightSource::QuantizedWeightSource(std::vector<WeightFileEntry> plain,
                                             std::vector<QuantizedWeight> quantized, DType dtype)
    : files_(AllEntries(std::move(plain), quantized)), threads_(std::make_unique<CopyThreads>()) {
  TIDAL_CHECK(dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16,
              InvalidArgument, "dtype of decoded weights: got ", DTypeName(dtype),
              ", expected float32, bfloat16 or float16");
  for (QuantizedWeight& weight : quantized) {
    CheckMatrix(weight);
    weight.block_rows = std::min(weight.block_rows, weight.shape[0]);
    weight.block_columns = std::min(weight.block_columns, weight.shape[1]);
    CheckParts(weight);
    WeightInfo info{dtype, weight.shape, weight.stored_name};
    std::string name = weight.name;
    TIDAL_CHECK(!matrices_.contains(name), WeightsError, name, ": listed twice");
    const CodedInfo coded = CodedInfoOf(weight);
    matrices_.emplace(std::move(name), Matrix{std::move(weight), std::move(info), coded});
  }
}

QuantizedWeightSource::~QuantizedWeightSource() = default;

const WeightInfo* QuantizedWeightSource::Find(const std::string& name) const {
  auto found = matrices_.find(name);
  return found == matrices_.end() ? files_.Find(name) : &found->second.info;
}

void QuantizedWeightSource::Read(const std::string& name, int64_t offset, int64_t bytes,
                                 void* dst) const {
  auto found = matrices_.find(name);
  if (found == matrices_.end()) return files_.Read(name, offset, bytes, dst);
  const Matrix& matrix = found->second;
  const int64_t size = DTypeBytes(matrix.info.dtype);
  const int64_t begin = offset / size, end = (offset + bytes) / size;
  TIDAL_CHECK(offset >= 0 && bytes >= 0 && offset % size == 0 && bytes % size == 0 &&
                  end <= NumElements(matrix.info.shape),
              InvalidArgument, name, ": bytes ", offset, " to ", offset + bytes,
              ", expected whole elements of ", ShapeString(matrix.info.shape), " in ",
              DTypeName(matrix.info.dtype));
  if (begin == end) return;
  Open(matrix);
  switch (matrix.info.dtype) {
    case DType::kFloat32:
      return Decode(matrix.stored, begin, end, static_cast<float*>(dst));
    case DType::kBFloat16:
      return Decode(matrix.stored, begin, end, static_cast<BFloat16*>(dst));
    default:
      return Decode(matrix.stored, begin, end, static_cast<Float16*>(dst));
  }
}

const CodedInfo* QuantizedWeightSource::FindCodes(const std::string& name) const {
  auto found = matrices_.find(name);
  if (found == matrices_.end() || found->second.coded.codes == WeightCodes::kNone) return nullptr;
  return &found->second.coded;
}

void QuantizedWeightSource::ReadCodes(const std::string& name, int64_t begin, int64_t end,
                                      const CodedRows& rows) const {
  const CodedInfo* coded = FindCodes(name);
  TIDAL_CHECK(coded != nullptr, InvalidArgument, name, ": it has no codes to read");
  const Matrix& matrix = matrices_.at(name);
  const QuantizedWeight& weight = matrix.stored;
  TIDAL_CHECK(begin >= 0 && begin <= end && end <= weight.shape[0], InvalidArgument, name,
              ": rows ", begin, " to ", end, ", expected rows of ", ShapeString(weight.shape));
  if (begin == end) return;
  Open(matrix);
  const StoredRows stored = ReadRows(weight, begin, end);
  const int64_t in = weight.shape[1];
  if (coded->codes == WeightCodes::kFloat8) {
    std::memcpy(rows.codes, stored.codes, static_cast<size_t>((end - begin) * in));
  } else {
    auto* words = static_cast<uint32_t*>(rows.codes);
    const int64_t grain = std::max<int64_t>(8, kDecodeElements / in / 8 * 8);
    threads_->ForPieces(end - begin, grain, [&](int64_t from, int64_t to) {
      PackRows(weight, {stored.codes, stored.codes_row, begin + from, begin + to},
               words + from * (in / 8));
    });
  }
  const int64_t groups = blocks_->columns;
  for (int64_t row = begin; row < end; ++row) {
    const float* scales = blocks_->scales.data() + row / weight.block_rows * groups;
    std::copy_n(scales, groups, rows.scales + (row - begin) * groups);
  }
  if (coded->has_zeros) {
    std::copy_n(blocks_->zeros.data() + begin * groups, (end - begin) * groups, rows.zeros);
  }
}

float QuantizedWeightSource::ReadInputScale(const std::string& name) const {
  auto found = matrices_.find(name);
  if (found == matrices_.end() || !found->second.stored.input_scale) return 0.0f;
  const WeightFileEntry& entry = *found->second.stored.input_scale;
  const std::vector<float> scales = ReadScales(files_, entry);
  TIDAL_CHECK(scales.size() == 1 && scales[0] > 0.0f, WeightsError, entry.name, ": holds ",
              scales.size(), " numbers, the first ", scales.empty() ? 0.0f : scales[0],
              ", expected one above 0; is ", entry.path, " damaged?");
  return scales[0];
}

void QuantizedWeightSource::CheckUnchanged() const {
  files_.CheckUnchanged();
}

// Reads what all pieces of a matrix need.
void QuantizedWeightSource::Open(const Matrix& matrix) const {
  if (open_ == &matrix) return;
  open_ = nullptr;
  const QuantizedWeight& weight = matrix.stored;
  const std::vector<float> scales = ReadScales(files_, weight.scales);
  std::vector<uint32_t> zeros;
  if (weight.zeros) {
    zeros.resize(static_cast<size_t>(NumElements(weight.zeros->info.shape)));
    files_.Read(weight.zeros->name, 0, static_cast<int64_t>(zeros.size() * sizeof(uint32_t)),
                zeros.data());
  }
  blocks_ = std::make_unique<DecodedBlocks>(
      DecodeBlocks(weight, scales.data(), weight.zeros ? zeros.data() : nullptr));
  if (!RowsLieApart(weight.format)) {
    ReadStored(weight, 0,
               NumElements(weight.codes.info.shape) * DTypeBytes(weight.codes.info.dtype));
  }
  open_ = &matrix;
}

void QuantizedWeightSource::ReadStored(const QuantizedWeight& weight, int64_t offset,
                                       int64_t bytes) const {
  codes_.resize((static_cast<size_t>(bytes) + sizeof(uint32_t) - 1) / sizeof(uint32_t));
  files_.Read(weight.codes.name, offset, bytes, codes_.data());
  TIDAL_CHECK(weight.format != WeightFormat::kFloat8 ||
                  !HoldsNan(reinterpret_cast<const uint8_t*>(codes_.data()), bytes),
              WeightsError, weight.codes.name, ": holds a NaN, expected numbers; is ",
              weight.codes.path, " damaged?");
}

StoredRows QuantizedWeightSource::ReadRows(const QuantizedWeight& weight, int64_t begin,
                                           int64_t end) const {
  if (!RowsLieApart(weight.format)) return {codes_.data(), 0, begin, end};
  const int64_t row_bytes = weight.codes.info.shape[1] * DTypeBytes(weight.codes.info.dtype);
  ReadStored(weight, begin * row_bytes, (end - begin) * row_bytes);
  return {codes_.data(), begin, begin, end};
}

// Decodes the elements [begin, end) of the open matrix.
template <typename T>
void QuantizedWeightSource::Decode(const QuantizedWeight& weight, int64_t begin, int64_t end,
                                   T* dst) const {
  const int64_t in = weight.shape[1];
  const int64_t first = begin / in, last = (end + in - 1) / in;
  const StoredRows stored = ReadRows(weight, first, last);
  auto decode = [&](int64_t from, int64_t to, T* out) {
    DecodeRows(weight, *blocks_, {stored.codes, stored.codes_row, from, to}, out);
  };
  auto decode_part = [&](int64_t row) {
    std::vector<T> values(static_cast<size_t>(in));
    decode(row, row + 1, values.data());
    const int64_t from = std::max(begin, row * in), to = std::min(end, (row + 1) * in);
    std::copy_n(values.data() + (from - row * in), to - from, dst + (from - begin));
  };
  const int64_t first_whole = (begin + in - 1) / in, last_whole = end / in;
  if (first < first_whole) decode_part(first);
  if (first_whole <= last_whole && last_whole < last) decode_part(last_whole);
  if (first_whole >= last_whole) return;
  const int64_t grain = std::max<int64_t>(8, kDecodeElements / in / 8 * 8);
  threads_->ForPieces(last_whole - first_whole, grain, [&](int64_t from, int64_t to) {
    decode(first_whole + from, first_whole + to, dst + ((first_whole + from) * in - begin));
  });
}

}  // namespace tidal
