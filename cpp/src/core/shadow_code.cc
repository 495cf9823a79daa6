#include "core/shadow_code.h"

#include <cmath>
#include <vector>

#include "core/int8_row.h"

namespace tidal {
namespace {

constexpr int kMostStackDims = 512;

// The dims of one key or query, without an allocation for the usual ones.
class Dims {
 public:
  explicit Dims(int head_dim) {
    if (head_dim > kMostStackDims) heap_.resize(static_cast<size_t>(head_dim));
  }
  float* data() { return heap_.empty() ? stack_ : heap_.data(); }

 private:
  float stack_[kMostStackDims];
  std::vector<float> heap_;
};

}  // namespace

void RotateForShadow(float* x, int head_dim) {
  const int block = ShadowBlock(head_dim);
  for (int i = 0; i < head_dim; ++i) x[i] *= ShadowSign(i);
  for (int distance = 1; distance < block; distance *= 2) {
    for (int first = 0; first < head_dim; first += 2 * distance) {
      for (int i = first; i < first + distance; ++i) {
        const float a = x[i], b = x[i + distance];
        x[i] = a + b;
        x[i + distance] = a - b;
      }
    }
  }
  const float norm = 1.0f / std::sqrt(static_cast<float>(block));
  for (int i = 0; i < head_dim; ++i) x[i] *= norm;
}

void EncodeShadowKey(const float* key, const float* balance, int head_dim, uint8_t* codes,
                     Float16* scale) {
  Dims dims(head_dim);
  float* x = dims.data();
  for (int i = 0; i < head_dim; ++i) x[i] = key[i] / balance[i];
  RotateForShadow(x, head_dim);
  // A scale beyond float16 would be an infinity, and the product with it a NaN.
  *scale = FromFloat<Float16>(LargestFinite(x, head_dim) / kShadowKeyLevels);
  const float step = ToFloat(*scale);
  for (int i = 0; i < head_dim; i += 2) {
    const int low = CodeOf(x[i], step, kShadowKeyLevels) + kShadowCodeBias;
    const int high = CodeOf(x[i + 1], step, kShadowKeyLevels) + kShadowCodeBias;
    codes[i / 2] = static_cast<uint8_t>(low | high << 4);
  }
}

ShadowQuery EncodeShadowQuery(const float* query, const float* balance, int head_dim,
                              int8_t* codes) {
  Dims dims(head_dim);
  float* x = dims.data();
  for (int i = 0; i < head_dim; ++i) x[i] = query[i] * balance[i];
  RotateForShadow(x, head_dim);
  ShadowQuery result = {LargestFinite(x, head_dim) / kShadowQueryLevels, 0};
  for (int i = 0; i < head_dim; ++i) {
    const int code = CodeOf(x[i], result.factor, kShadowQueryLevels);
    codes[i % 2 * (head_dim / 2) + i / 2] = static_cast<int8_t>(code);
    result.sum += code;
  }
  return result;
}

}  // namespace tidal
