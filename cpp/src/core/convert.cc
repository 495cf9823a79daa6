#include "core/convert.h"

#include "core/float16.h"

namespace tidal {
namespace {

template <typename From, typename To>
void Convert(const From* from, To* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = FromFloat<To>(ToFloat(from[i]));
}

template <typename From>
void ConvertFrom(const From* from, const NumbersTo& to, int64_t count) {
  switch (to.dtype) {
    case DType::kFloat32:
      return Convert(from, static_cast<float*>(to.data), count);
    case DType::kBFloat16:
      return Convert(from, static_cast<BFloat16*>(to.data), count);
    default:
      return Convert(from, static_cast<Float16*>(to.data), count);
  }
}

}  // namespace

void ConvertNumbers(const NumbersFrom& from, const NumbersTo& to, int64_t count) {
  switch (from.dtype) {
    case DType::kFloat32:
      return ConvertFrom(static_cast<const float*>(from.data), to, count);
    case DType::kBFloat16:
      return ConvertFrom(static_cast<const BFloat16*>(from.data), to, count);
    default:
      return ConvertFrom(static_cast<const Float16*>(from.data), to, count);
  }
}

}  // namespace tidal
