// Quantised matrices: every code of every format against its definition in double precision, any
// piece of any shape, and parts that do not fit.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/float16.h"
#include "core/float8.h"
#include "core/mxfp4.h"
#include "model/weight_format.h"
#include "throws.h"
#include "tidal/error.h"
#include "tidal/quantized_weights.h"

namespace tidal::test {
namespace {

constexpr WeightFormat kFormats[] = {WeightFormat::kFloat8,     WeightFormat::kInt8,
                                     WeightFormat::kInt8Packed, WeightFormat::kInt4Packed,
                                     WeightFormat::kInt4Gptq,   WeightFormat::kInt4Awq,
                                     WeightFormat::kMxfp4};

// The value of a float8 e4m3fn by the definition of the format.
double Float8Value(int code) {
  const int exponent = (code >> 3) & 15, mantissa = code & 7;
  const double sign = code & 128 ? -1.0 : 1.0;
  if (exponent == 15 && mantissa == 7) return NAN;
  if (exponent == 0) return sign * std::ldexp(mantissa, -9);
  return sign * std::ldexp(8 + mantissa, exponent - 10);
}

// The same of a float4 e2m1.
double Float4Value(int code) {
  const int exponent = (code >> 1) & 3, mantissa = code & 1;
  const double sign = code & 8 ? -1.0 : 1.0;
  return sign * (exponent == 0 ? 0.5 * mantissa : std::ldexp(2 + mantissa, exponent - 2));
}

TEST(Float8, EveryCodeIsWhatItsBitsSay) {
  for (int code = 0; code < 256; ++code) {
    const float got = Float8ToFloat(static_cast<uint8_t>(code));
    const double want = Float8Value(code);
    EXPECT_TRUE(std::isnan(want) ? std::isnan(got) : got == want) << code << ": " << got;
    EXPECT_EQ(std::signbit(got), code >= 128) << code;
  }
}

struct Shape {
  int64_t out, in, block_rows, block_columns;
};

// A random matrix in a file of its own, and what it means.
class Stored {
 public:
  Stored(WeightFormat format, Shape shape, bool has_zeros, int zero_offset = 0)
      : path_(Concat(::testing::TempDir(), "tidal_quantized_", getpid(), ".bin")) {
    const bool is_mxfp4 = format == WeightFormat::kMxfp4;
    const bool is_bytes =
        is_mxfp4 || format == WeightFormat::kFloat8 || format == WeightFormat::kInt8;
    weight.name = "m.weight";
    weight.shape = {shape.out, shape.in};
    weight.format = format;
    weight.block_rows = shape.block_rows;
    weight.block_columns = shape.block_columns;
    weight.zero_offset = zero_offset;
    const PartShapes parts = ExpectedParts(weight);
    codes = RandomBytes(Count(parts.codes) * (is_bytes ? 1 : 4));
    for (char& code : codes) {  // NaN is refused
      if (format == WeightFormat::kFloat8 && (code & 127) == 127)
        code = static_cast<char>(code ^ 1);
    }
    for (int64_t i = 0; i < Count(parts.scales); ++i) {
      scales.push_back(is_mxfp4 ? std::ldexp(1.0f, static_cast<int>(random_() % 255) - 127)
                                : std::ldexp(static_cast<float>(random_() % 2001) - 1000.0f, -12));
    }
    if (has_zeros) zeros = RandomBytes(Count(parts.zeros) * 4);
    weight.codes = Entry("m.codes", is_bytes ? DType::kUInt8 : DType::kInt32, parts.codes);
    weight.scales = Entry("m.scales", is_mxfp4 ? DType::kUInt8 : DType::kFloat32, parts.scales);
    if (has_zeros) weight.zeros = Entry("m.zeros", DType::kInt32, parts.zeros);
    Write();
  }
  ~Stored() { std::remove(path_.c_str()); }

  // Puts the parts into the file, one behind the other.
  void Write() {
    std::ofstream file(path_, std::ios::binary);
    file << "header";
    weight.codes.file_offset = 6;
    file.write(codes.data(), static_cast<std::streamsize>(codes.size()));
    weight.scales.file_offset = weight.codes.file_offset + static_cast<int64_t>(codes.size());
    if (weight.format == WeightFormat::kMxfp4) {
      for (float scale : scales) {
        file.put(static_cast<char>(std::isnan(scale) ? 255 : std::ilogb(scale) + 127));
      }
    } else {
      file.write(reinterpret_cast<const char*>(scales.data()),
                 static_cast<std::streamsize>(scales.size() * sizeof(float)));
    }
    if (weight.zeros) {
      weight.zeros->file_offset =
          weight.scales.file_offset + static_cast<int64_t>(scales.size() * sizeof(float));
      file.write(zeros.data(), static_cast<std::streamsize>(zeros.size()));
    }
    file.close();
    struct stat status = {};
    stat(path_.c_str(), &status);
    const FileIdentity identity{
        .device = status.st_dev,
        .inode = status.st_ino,
        .size = status.st_size,
        .mtime_ns = status.st_mtim.tv_sec * 1'000'000'000 + status.st_mtim.tv_nsec};
    weight.codes.identity = weight.scales.identity = identity;
    if (weight.zeros) weight.zeros->identity = identity;
  }

  // An element before it is rounded: the definition of the formats, one element at a time.
  float Value(int64_t o, int64_t i) const {
    const int64_t out = weight.shape[0], in = weight.shape[1];
    const int64_t block = i / weight.block_columns, row_block = o / weight.block_rows;
    const int64_t blocks = (in + weight.block_columns - 1) / weight.block_columns;
    const int64_t row_blocks = (out + weight.block_rows - 1) / weight.block_rows;
    const float scale = scales[static_cast<size_t>(Transposed() ? block * row_blocks + row_block
                                                                : row_block * blocks + block)];
    return static_cast<float>(Code(o, i) - Zero(o, block, blocks)) * scale;
  }

  QuantizedWeight weight;
  std::vector<char> codes;
  std::vector<float> scales;
  std::vector<char> zeros;

 private:
  static int64_t Count(const std::vector<int64_t>& shape) {
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    return count;
  }

  bool Transposed() const {
    return weight.format == WeightFormat::kInt4Gptq || weight.format == WeightFormat::kInt4Awq;
  }

  std::vector<char> RandomBytes(int64_t count) {
    std::vector<char> bytes(static_cast<size_t>(count));
    for (char& byte : bytes) byte = static_cast<char>(random_());
    return bytes;
  }

  WeightFileEntry Entry(const std::string& name, DType dtype, std::vector<int64_t> shape) const {
    return {.name = name,
            .info = {dtype, std::move(shape)},
            .path = path_,
            .file_offset = 0,
            .identity = {}};
  }

  // Nibble `index` of the words, each of which has its first in the lowest bits.
  static int Nibble(const std::vector<char>& words, int64_t index) {
    const auto byte = static_cast<unsigned char>(words[static_cast<size_t>(index / 2)]);
    return index % 2 == 0 ? byte & 15 : byte >> 4;
  }

  // The nibble of row o in its word of 8 rows, as AWQ orders them.
  static int64_t AwqPlace(int64_t o) {
    constexpr int kRows[] = {0, 2, 4, 6, 1, 3, 5, 7};  // from the lowest nibble on
    int64_t place = 0;
    while (kRows[place] != o % 8) ++place;
    return o / 8 * 8 + place;
  }

  double Code(int64_t o, int64_t i) const {
    const int64_t out = weight.shape[0], in = weight.shape[1];
    switch (weight.format) {
      case WeightFormat::kFloat8:
        return Float8Value(static_cast<unsigned char>(codes[static_cast<size_t>(o * in + i)]));
      case WeightFormat::kInt8:
        return static_cast<signed char>(codes[static_cast<size_t>(o * in + i)]);
      case WeightFormat::kInt8Packed:
        return static_cast<unsigned char>(codes[static_cast<size_t>(o * ((in + 3) / 4 * 4) + i)]);
      case WeightFormat::kInt4Packed:
        return Nibble(codes, o * ((in + 7) / 8 * 8) + i);
      case WeightFormat::kInt4Gptq:
        return Nibble(codes, (i / 8 * out + o) * 8 + i % 8);
      case WeightFormat::kInt4Awq:
        return Nibble(codes, i * out + AwqPlace(o));
      case WeightFormat::kMxfp4:
        return Float4Value(Nibble(codes, o * in + i));
    }
    return 0;
  }

  int Zero(int64_t o, int64_t block, int64_t blocks) const {
    if (weight.format == WeightFormat::kFloat8 || weight.format == WeightFormat::kInt8 ||
        weight.format == WeightFormat::kMxfp4) {
      return 0;
    }
    if (weight.format == WeightFormat::kInt8Packed) {
      if (!weight.zeros) return 128;
      const auto place = static_cast<size_t>((o / 4 * blocks + block) * 4 + o % 4);
      return (static_cast<unsigned char>(zeros[place]) + weight.zero_offset) % 256;
    }
    if (!weight.zeros) return 8;
    const int64_t out = weight.shape[0], row = (out + 7) / 8 * 8;
    const int stored = weight.format == WeightFormat::kInt4Packed
                           ? Nibble(zeros, (o / 8 * blocks + block) * 8 + o % 8)
                       : weight.format == WeightFormat::kInt4Gptq
                           ? Nibble(zeros, block * row + o)
                           : Nibble(zeros, block * row + AwqPlace(o));
    return (stored + weight.zero_offset) % 16;
  }

  std::string path_;
  std::mt19937 random_{7};
};

// The same bits, or NaN of any.
template <typename T>
bool Same(const T* one, const T* other, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (std::isnan(ToFloat(one[i])) && std::isnan(ToFloat(other[i]))) continue;
    if (std::memcmp(&one[i], &other[i], sizeof(T)) != 0) return false;
  }
  return true;
}

// All elements, rounded to T by the definition, and what the source reads in pieces.
template <typename T>
void ExpectPieces(const Stored& stored, DType dtype, std::mt19937& random) {
  const int64_t out = stored.weight.shape[0], in = stored.weight.shape[1];
  std::vector<T> want;
  for (int64_t o = 0; o < out; ++o) {
    for (int64_t i = 0; i < in; ++i) want.push_back(FromFloat<T>(stored.Value(o, i)));
  }
  const QuantizedWeightSource source({}, {stored.weight}, dtype);
  ASSERT_NE(source.Find("m.weight"), nullptr);
  EXPECT_EQ(source.Find("m.weight")->shape, stored.weight.shape);
  EXPECT_EQ(source.Find("m.weight")->dtype, dtype);
  constexpr auto kSize = static_cast<int64_t>(sizeof(T));
  for (int piece = 0; piece < 12; ++piece) {
    const int64_t begin = piece == 0 ? 0 : random() % (out * in);
    const int64_t count = piece == 0 ? out * in : random() % (out * in - begin) + 1;
    std::vector<T> got(static_cast<size_t>(count));
    source.Read("m.weight", begin * kSize, count * kSize, got.data());
    EXPECT_TRUE(Same(got.data(), want.data() + begin, got.size()))
        << "elements " << begin << " to " << begin + count;
  }
  source.CheckUnchanged();
}

TEST(QuantizedWeights, EveryFormatMeansWhatItsDefinitionSays) {
  std::mt19937 random(1);
  for (WeightFormat format : kFormats) {
    const bool is_bytes = format == WeightFormat::kFloat8 || format == WeightFormat::kInt8;
    const std::vector<Shape> shapes =
        is_bytes ? std::vector<Shape>{{7, 5, 7, 5},         {9, 11, 1, 11},  {37, 45, 16, 16},
                                      {130, 257, 128, 128}, {64, 40, 64, 8}, {600, 700, 600, 700}}
                 : std::vector<Shape>{{8, 16, 1, 16},  {24, 64, 1, 32},    {16, 128, 1, 8},
                                      {40, 24, 1, 24}, {512, 640, 1, 128}, {16, 32, 16, 32}};
    for (const Shape& shape : shapes) {
      for (bool has_zeros : {false, true}) {
        if (has_zeros && (is_bytes || format == WeightFormat::kMxfp4 || shape.block_rows != 1)) {
          continue;
        }
        for (int offset : {0, 1}) {
          if (offset && !has_zeros) continue;
          SCOPED_TRACE(Concat("format ", static_cast<int>(format), ": ", shape.out, " x ", shape.in,
                              ", zeros ", has_zeros, " + ", offset));
          const Stored stored(format, shape, has_zeros, offset);
          ExpectPieces<float>(stored, DType::kFloat32, random);
          ExpectPieces<BFloat16>(stored, DType::kBFloat16, random);
          ExpectPieces<Float16>(stored, DType::kFloat16, random);
        }
      }
    }
  }
}

// Codes, scales and zeros as products read them mean what Read gives.
TEST(QuantizedWeights, CodesMeanTheSameNumbers) {
  std::mt19937 random(3);
  for (WeightFormat format : kFormats) {
    const bool is_float8 = format == WeightFormat::kFloat8;
    const bool is_mxfp4 = format == WeightFormat::kMxfp4;
    const bool is_int4 = !is_float8 && !is_mxfp4 && format != WeightFormat::kInt8 &&
                         format != WeightFormat::kInt8Packed;
    for (const Shape& shape : {Shape{16, 64, 1, 32}, {40, 24, 1, 24}, {72, 256, 8, 128}}) {
      const bool has_zeros = is_int4 && shape.block_rows == 1;
      SCOPED_TRACE(Concat("format ", static_cast<int>(format), ": ", shape.out, " x ", shape.in));
      const Stored stored(format, shape, has_zeros, has_zeros);
      const QuantizedWeightSource source({}, {stored.weight}, DType::kFloat32);
      const CodedInfo* info = source.FindCodes("m.weight");
      const bool is_kept = is_float8 || is_int4 || (is_mxfp4 && shape.block_columns == 32);
      if (!is_kept) {
        EXPECT_EQ(info, nullptr);
        continue;
      }
      ASSERT_NE(info, nullptr);
      EXPECT_EQ(info->codes, is_float8 ? WeightCodes::kFloat8
                             : is_int4 ? WeightCodes::kInt4
                                       : WeightCodes::kMxfp4);
      EXPECT_EQ(info->group_size, shape.block_columns);
      EXPECT_EQ(info->has_zeros, has_zeros);
      const int64_t groups = (shape.in + shape.block_columns - 1) / shape.block_columns;
      for (int piece = 0; piece < 4; ++piece) {
        const int64_t begin = piece == 0 ? 0 : random() % shape.out;
        const int64_t rows = piece == 0 ? shape.out : random() % (shape.out - begin) + 1;
        std::vector<uint8_t> codes(static_cast<size_t>(rows * shape.in / (is_float8 ? 1 : 2)));
        std::vector<float> scales(static_cast<size_t>(rows * groups));
        std::vector<uint8_t> zeros(scales.size(), 8);
        source.ReadCodes("m.weight", begin, begin + rows,
                         {codes.data(), scales.data(), has_zeros ? zeros.data() : nullptr});
        for (int64_t i = 0; i < rows * shape.in; ++i) {
          const int64_t row = i / shape.in, column = i % shape.in;
          const auto place = static_cast<size_t>(row * groups + column / shape.block_columns);
          const uint8_t code = codes[static_cast<size_t>(is_float8 ? i : i / 2)];
          const int half = (code >> (i % 2 * 4)) & 15;
          const float value = is_float8 ? Float8ToFloat(code)
                              : is_int4 ? static_cast<float>(half - zeros[place])
                                        : kFloat4Values[half];
          ASSERT_EQ(value * scales[place], stored.Value(begin + row, column)) << i;
        }
      }
    }
  }
}

TEST(QuantizedWeights, ANanAmongCodesIsRefused) {
  Stored stored(WeightFormat::kFloat8, {16, 64, 1, 64}, false);
  for (int code : {0x7f, 0xff}) {
    stored.codes[700] = static_cast<char>(code);
    stored.Write();
    const QuantizedWeightSource source({}, {stored.weight}, DType::kBFloat16);
    std::vector<uint8_t> codes(16 * 64);
    std::vector<float> scales(16);
    EXPECT_TRUE(Throws<WeightsError>(
        [&] {
          source.ReadCodes("m.weight", 0, 16, {codes.data(), scales.data(), nullptr});
        },
        {"m.codes", "NaN"}));
    std::vector<uint16_t> numbers(16 * 64);
    EXPECT_TRUE(Throws<WeightsError>(
        [&] { source.Read("m.weight", 0, 16 * 64 * 2, numbers.data()); }, {"m.codes", "NaN"}));
  }
}

TEST(QuantizedWeights, RowsOfPackedCodesMayEndInsideAWord) {
  std::mt19937 random(2);
  for (WeightFormat format : {WeightFormat::kInt4Packed, WeightFormat::kInt8Packed}) {
    for (int64_t in : {1, 7, 9, 15, 61}) {
      for (bool has_zeros : {false, true}) {
        const Stored stored(format, {13, in, 1, in}, has_zeros);
        ExpectPieces<BFloat16>(stored, DType::kBFloat16, random);
      }
    }
  }
}

// 16-bit scales are widened before the product, which is rounded once.
TEST(QuantizedWeights, ScalesMayHaveAnyFloatType) {
  Stored stored(WeightFormat::kInt8, {4, 8, 1, 8}, false);
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    std::vector<uint16_t> bits;
    for (float& scale : stored.scales) {
      if (dtype == DType::kBFloat16) {
        bits.push_back(FromFloat<BFloat16>(scale).bits);
        scale = ToFloat(BFloat16{bits.back()});
      } else {
        bits.push_back(FromFloat<Float16>(scale).bits);
        scale = ToFloat(Float16{bits.back()});
      }
    }
    const std::vector<float> wide = stored.scales;
    stored.scales.assign(2, 0.0f);
    std::memcpy(stored.scales.data(), bits.data(), bits.size() * sizeof(uint16_t));
    stored.weight.scales.info.dtype = dtype;
    stored.Write();
    stored.scales = wide;
    std::mt19937 random(3);
    ExpectPieces<float>(stored, DType::kFloat32, random);
  }
}

TEST(QuantizedWeights, OtherTensorsAreShownAsTheyAre) {
  const Stored stored(WeightFormat::kInt8, {4, 8, 1, 8}, false);
  WeightFileEntry norm = stored.weight.scales;
  norm.name = "norm.weight";
  const QuantizedWeightSource source({norm}, {stored.weight}, DType::kBFloat16);
  ASSERT_NE(source.Find("norm.weight"), nullptr);
  EXPECT_EQ(source.Find("norm.weight")->dtype, DType::kFloat32);
  std::vector<float> got(4);
  source.Read("norm.weight", 0, 16, got.data());
  EXPECT_EQ(got, stored.scales);
  EXPECT_EQ(source.Find("m.absent"), nullptr);
}

// What a change makes of the parts of a matrix, and what the error must say.
struct Misfit {
  std::function<void(QuantizedWeight&)> change;
  std::vector<std::string> message;
};

TEST(QuantizedWeights, PartsThatDoNotFitAreRefusedByName) {
  const Stored stored(WeightFormat::kInt4Packed, {24, 64, 1, 32}, true);
  const std::vector<Misfit> misfits = {
      {[](auto& w) { w.shape = {24}; }, {"m.weight", "[24]", "expected a matrix"}},
      {[](auto& w) {
         w.shape = {24, 72};
       },
       {"m.codes", "[24, 8]", "expected [24, 9]"}},
      {[](auto& w) { w.block_columns = 0; }, {"m.weight", "1 x 0", "positive"}},
      {[](auto& w) { w.block_columns = 16; }, {"m.scales", "[24, 2]", "expected [24, 4]"}},
      {[](auto& w) { w.scales.info.shape = {48}; }, {"m.scales", "[48]", "expected [24, 2]"}},
      {[](auto& w) {
         w.zeros->info.shape = {24, 2};
       },
       {"m.zeros", "[24, 2]", "[3, 2]"}},
      {[](auto& w) { w.zeros->info.dtype = DType::kUInt8; }, {"m.zeros", "uint8", "int32"}},
      {[](auto& w) { w.codes.info.dtype = DType::kUInt8; }, {"m.codes", "uint8", "int32"}},
      {[](auto& w) { w.scales.info.dtype = DType::kInt32; }, {"m.scales", "int32", "float32"}},
      {[](auto& w) { w.format = WeightFormat::kFloat8; }, {"m.codes", "expected [24, 64]"}},
  };
  for (const Misfit& misfit : misfits) {
    SCOPED_TRACE(misfit.message.back());
    QuantizedWeight weight = stored.weight;
    misfit.change(weight);
    std::vector<std::string> parts = misfit.message;
    for (const std::string& part : parts) {
      EXPECT_TRUE(Throws<WeightsError>(
          [&] { QuantizedWeightSource({}, {weight}, DType::kBFloat16); }, {part}));
    }
  }
  QuantizedWeight weight = stored.weight;
  weight.block_columns = 12;
  weight.scales.info.shape = {24, 6};
  weight.zeros->info.shape = {3, 6};
  EXPECT_TRUE(Throws<WeightsError>([&] { QuantizedWeightSource({}, {weight}, DType::kBFloat16); },
                                   {"m.weight", "groups of 12", "multiple of 8"}));
  EXPECT_TRUE(Throws<WeightsError>(
      [&] {
        QuantizedWeightSource({}, {stored.weight, stored.weight}, DType::kBFloat16);
      },
      {"listed twice"}));
}

TEST(QuantizedWeights, AScaleThatIsNotFiniteIsRefused) {
  for (float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
    Stored stored(WeightFormat::kFloat8, {4, 8, 1, 8}, false);
    stored.scales[2] = bad;
    stored.Write();
    const QuantizedWeightSource source({}, {stored.weight}, DType::kFloat32);
    float value;
    EXPECT_TRUE(Throws<WeightsError>([&] { source.Read("m.weight", 0, 4, &value); },
                                     {"m.scales", "expected finite", "damaged"}));
  }
}

TEST(QuantizedWeights, ANanScaleOfMxfp4IsRefused) {
  Stored stored(WeightFormat::kMxfp4, {4, 64, 1, 32}, false);
  stored.scales[3] = std::nanf("");
  stored.Write();
  const QuantizedWeightSource source({}, {stored.weight}, DType::kBFloat16);
  uint16_t value;
  EXPECT_TRUE(Throws<WeightsError>([&] { source.Read("m.weight", 0, 2, &value); },
                                   {"m.scales", "holds nan", "expected finite", "damaged"}));
}

TEST(QuantizedWeights, OnlyWholeElementsInsideTheTensorAreRead) {
  const Stored stored(WeightFormat::kFloat8, {4, 8, 1, 8}, false);
  const QuantizedWeightSource source({}, {stored.weight}, DType::kBFloat16);
  std::vector<char> data(256);
  source.Read("m.weight", 64, 0, data.data());
  for (auto [offset, bytes] : {std::pair{1, 2}, {0, 3}, {0, 66}, {64, 2}, {-2, 2}}) {
    EXPECT_TRUE(Throws<InvalidArgument>(
        [&] { source.Read("m.weight", offset, bytes, data.data()); }, {"m.weight", "[4, 8]"}));
  }
}

}  // namespace
}  // namespace tidal::test
