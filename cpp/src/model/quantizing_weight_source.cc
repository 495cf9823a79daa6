// QuantizingWeightSource: rounds rows to codes on several threads, as they are asked for.
#include <algorithm>
#include <cmath>
#include <utility>

#include "core/convert.h"
#include "core/float16.h"
#include "core/float8.h"
#include "core/mxfp4.h"
#include "core/parallel.h"
#include "core/shape.h"
#include "model/weight_format.h"
#include "tidal/error.h"
#include "tidal/quantized_weights.h"

namespace tidal {
namespace {

constexpr float kHalfInt4Range = 7.5f;  // from -7.5 to 7.5: as compressed-tensors rounds

float LargestOf(const float* values, int64_t count) {
  float largest = 0.0f;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(values[i]));
  return largest;
}

// A group of one row.
struct Group {
  const float* values;
  int64_t begin;  // of the row
  int64_t count;
};

// Writes a group's codes to those of its row and returns their scale, which its type holds exactly.
float RoundToFloat8(const Group& group, uint8_t* row) {
  const float scale = Float8Scale(LargestOf(group.values, group.count));
  for (int64_t i = 0; i < group.count; ++i) {
    row[group.begin + i] = FloatToFloat8(group.values[i] / scale);
  }
  return scale;
}

// Puts one of 4 bits into its half of a byte; those before it are there.
void PutHalf(uint8_t code, int64_t place, uint8_t* row) {
  const auto half = static_cast<uint8_t>(code << (place % 2 * 4));
  row[place / 2] = static_cast<uint8_t>(place % 2 == 0 ? half : row[place / 2] | half);
}

float RoundToInt4(const Group& group, uint8_t* row) {
  const float largest = LargestOf(group.values, group.count);
  float scale = ToFloat(FromFloat<BFloat16>(largest / kHalfInt4Range));
  if (!(scale > 0.0f)) scale = 1.0f;
  for (int64_t i = 0; i < group.count; ++i) {
    const float code = std::clamp(std::nearbyint(group.values[i] / scale), -8.0f, 7.0f) + 8.0f;
    PutHalf(static_cast<uint8_t>(code), group.begin + i, row);
  }
  return scale;
}

// The largest float4, 6, has the power of 2 of 4.
float RoundToMxfp4(const Group& group, uint8_t* row) {
  const float largest = LargestOf(group.values, group.count);
  const int power = largest > 0.0f ? std::max(std::ilogb(largest) - 2, -127) : 0;
  const float scale = std::ldexp(1.0f, power);
  for (int64_t i = 0; i < group.count; ++i) {
    PutHalf(FloatToFloat4(group.values[i] / scale), group.begin + i, row);
  }
  return scale;
}

float RoundTo(WeightCodes codes, const Group& group, uint8_t* row) {
  if (codes == WeightCodes::kFloat8) return RoundToFloat8(group, row);
  return codes == WeightCodes::kInt4 ? RoundToInt4(group, row) : RoundToMxfp4(group, row);
}

// What a code of a row stands for, before the scale.
float CodeValue(WeightCodes codes, const uint8_t* row, int64_t place) {
  if (codes == WeightCodes::kFloat8) return Float8ToFloat(row[place]);
  const int code = (row[place / 2] >> (place % 2 * 4)) & 15;
  return codes == WeightCodes::kInt4 ? static_cast<float>(code - 8)
                                     : kFloat4Values[static_cast<size_t>(code)];
}

}  // namespace

QuantizingWeightSource::QuantizingWeightSource(std::unique_ptr<WeightSource> numbers,
                                               WeightCodes codes, CodedPart part)
    : WeightSourceOver(std::move(numbers)),
      codes_(codes),
      part_(part),
      threads_(std::make_unique<CopyThreads>()) {
  TIDAL_CHECK(codes != WeightCodes::kNone, InvalidArgument,
              "codes of weights: got none, expected float8, int4 or mxfp4");
}

QuantizingWeightSource::~QuantizingWeightSource() = default;

std::string QuantizingWeightSource::SourceName(const std::string& name) const {
  const bool is_tied_head = part_ == CodedPart::kLmHead && PartOf(name) == CodedPart::kLmHead &&
                            source().Find(name) == nullptr;
  return is_tied_head ? "model.embed_tokens.weight" : name;
}

const WeightInfo* QuantizingWeightSource::Find(const std::string& name) const {
  return source().Find(SourceName(name));
}

const CodedInfo* QuantizingWeightSource::FindCodes(const std::string& name) const {
  const CodedInfo* rounded = FindRounded(name);
  return rounded != nullptr ? rounded : source().FindCodes(name);
}

const CodedInfo* QuantizingWeightSource::FindRounded(const std::string& name) const {
  auto known = infos_.find(name);
  if (known != infos_.end()) return &known->second;
  const WeightInfo* info = Find(name);
  if (info == nullptr) return nullptr;
  const DType scale_dtype = codes_ == WeightCodes::kFloat8 ? DType::kFloat32 : DType::kBFloat16;
  const CodedInfo coded = CodesOf(name, *info, {part_, codes_, scale_dtype});
  if (coded.codes == WeightCodes::kNone) return nullptr;
  return &infos_.emplace(name, coded).first->second;
}

// Rows [begin, end) as float32 numbers.
std::vector<float> QuantizingWeightSource::ReadNumbers(const std::string& name, int64_t begin,
                                                       int64_t end) const {
  const WeightInfo& info = *Find(name);
  const int64_t in = info.shape[1], count = (end - begin) * in, size = DTypeBytes(info.dtype);
  std::vector<char> data(static_cast<size_t>(count * size));
  source().Read(SourceName(name), begin * in * size, count * size, data.data());
  std::vector<float> values(static_cast<size_t>(count));
  threads_->ForPieces(end - begin, 8, [&](int64_t first, int64_t last) {
    ConvertNumbers({data.data() + first * in * size, info.dtype},
                   {values.data() + first * in, DType::kFloat32}, (last - first) * in);
  });
  for (float value : values) {
    TIDAL_CHECK(std::isfinite(value), WeightsError, info.NameToShow(name), ": holds ", value,
                ", expected finite numbers; is the file damaged?");
  }
  return values;
}

void QuantizingWeightSource::ReadCodes(const std::string& name, int64_t begin, int64_t end,
                                       const CodedRows& rows) const {
  const CodedInfo* coded = FindRounded(name);
  if (coded == nullptr) return source().ReadCodes(name, begin, end, rows);
  if (begin == end) return;
  const std::vector<float> numbers = ReadNumbers(name, begin, end);
  const int64_t in = Find(name)->shape[1];
  const int64_t groups = coded->num_groups(in);
  std::vector<double> errors(static_cast<size_t>(end - begin)), sizes(errors.size());
  threads_->ForPieces(end - begin, 8, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      uint8_t* row = static_cast<uint8_t*>(rows.codes) + r * coded->row_bytes(in);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t from = g * coded->group_size;
        const Group group = {numbers.data() + r * in + from, from,
                             std::min(coded->group_size, in - from)};
        const float scale = RoundTo(coded->codes, group, row);
        rows.scales[r * groups + g] = scale;
        for (int64_t i = 0; i < group.count; ++i) {
          const double value = group.values[i];
          const double error = CodeValue(coded->codes, row, from + i) * scale - value;
          errors[static_cast<size_t>(r)] += error * error;
          sizes[static_cast<size_t>(r)] += value * value;
        }
      }
    }
  });
  for (size_t r = 0; r < errors.size(); ++r) {
    squared_error_ += errors[r];
    squared_size_ += sizes[r];
  }
}

void QuantizingWeightSource::Read(const std::string& name, int64_t offset, int64_t bytes,
                                  void* dst) const {
  const CodedInfo* coded = FindRounded(name);
  if (coded == nullptr || bytes == 0) return source().Read(SourceName(name), offset, bytes, dst);
  const WeightInfo& info = *Find(name);
  const int64_t in = info.shape[1], size = DTypeBytes(info.dtype);
  TIDAL_CHECK(offset >= 0 && bytes >= 0 && offset % size == 0 && bytes % size == 0 &&
                  (offset + bytes) / size <= NumElements(info.shape),
              InvalidArgument, name, ": bytes ", offset, " to ", offset + bytes,
              ", expected whole elements of ", ShapeString(info.shape), " in ",
              DTypeName(info.dtype));
  const int64_t begin = offset / size, end = begin + bytes / size;
  const int64_t first = begin / in, last = (end + in - 1) / in;
  const int64_t groups = coded->num_groups(in), row_bytes = coded->row_bytes(in);
  std::vector<uint8_t> codes(static_cast<size_t>((last - first) * row_bytes));
  std::vector<float> scales(static_cast<size_t>((last - first) * groups));
  ReadCodes(name, first, last, {codes.data(), scales.data(), nullptr});
  threads_->ForPieces(end - begin, int64_t{1} << 16, [&](int64_t from, int64_t to) {
    std::vector<float> values(static_cast<size_t>(to - from));
    for (int64_t i = from; i < to; ++i) {
      const int64_t row = (begin + i) / in - first, place = (begin + i) % in;
      const float scale = scales[static_cast<size_t>(row * groups + place / coded->group_size)];
      const float value = CodeValue(coded->codes, codes.data() + row * row_bytes, place) * scale;
      values[static_cast<size_t>(i - from)] = value;
    }
    ConvertNumbers({values.data(), DType::kFloat32},
                   {static_cast<char*>(dst) + from * size, info.dtype}, to - from);
  });
}

double QuantizingWeightSource::relative_error() const {
  return squared_size_ > 0.0 ? std::sqrt(squared_error_ / squared_size_) : 0.0;
}

}  // namespace tidal
