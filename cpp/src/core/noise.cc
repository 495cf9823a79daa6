#include "core/noise.h"

#include <algorithm>
#include <cstring>
#include <random>

#include "core/float16.h"
#include "core/float8.h"
#include "core/int8_row.h"
#include "tidal/error.h"

namespace tidal {
namespace {

template <typename T>
T Rounded(float value) {
  return FromFloat<T>(value);
}
template <>
int8_t Rounded<int8_t>(float value) {
  return static_cast<int8_t>(CodeOf(value, 1.0f / Noise::kInt8PerUnit, kInt8Levels));
}

template <typename T>
void Fill(std::vector<char>& block, Normal normal, uint64_t seed) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<float> draw(static_cast<float>(normal.mean),
                                       static_cast<float>(normal.stddev));
  for (size_t at = 0; at < block.size(); at += sizeof(T)) {
    T value = Rounded<T>(draw(engine));
    std::memcpy(block.data() + at, &value, sizeof(T));
  }
}

}  // namespace

Noise::Noise(DType dtype, Normal normal, uint64_t seed, int64_t block_elements)
    : block_(static_cast<size_t>(block_elements * DTypeBytes(dtype))) {
  switch (dtype) {
    case DType::kFloat32:
      Fill<float>(block_, normal, seed);
      break;
    case DType::kBFloat16:
      Fill<BFloat16>(block_, normal, seed);
      break;
    case DType::kFloat16:
      Fill<Float16>(block_, normal, seed);
      break;
    case DType::kInt8:
      Fill<int8_t>(block_, normal, seed);
      break;
    case DType::kFloat8:
      Fill<Float8>(block_, normal, seed);
      break;
    default:
      throw InvalidArgument(Concat("random values: got dtype ", DTypeName(dtype),
                                   ", expected float32, bfloat16, float16, int8 or fp8"));
  }
}

std::span<const char> Noise::From(int64_t offset) const {
  return std::span(block_).subspan(static_cast<size_t>(offset) % block_.size());
}

void Noise::Read(int64_t offset, int64_t bytes, void* dst) const {
  for (int64_t done = 0; done < bytes;) {
    std::span<const char> piece = From(offset + done);
    int64_t count = std::min(bytes - done, static_cast<int64_t>(piece.size()));
    std::memcpy(static_cast<char*>(dst) + done, piece.data(), static_cast<size_t>(count));
    done += count;
  }
}

}  // namespace tidal
