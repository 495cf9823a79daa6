// Conversions between float32 and the 16-bit storage types: every value, every kind of rounding.
#include "core/float16.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace tidal::test {
namespace {

template <typename T>
struct Format;
template <>
struct Format<BFloat16> {
  static constexpr int kMantissaBits = 7, kMinExponent = -126;
  static constexpr double kMax = 3.3895313892515355e38;
};
template <>
struct Format<Float16> {
  static constexpr int kMantissaBits = 10, kMinExponent = -14;
  static constexpr double kMax = 65504.0;
};

template <typename T>
class Float16Types : public ::testing::Test {};
using Types = ::testing::Types<BFloat16, Float16>;
TYPED_TEST_SUITE(Float16Types, Types);

// The value of a bit pattern by the definition of the format, in double precision.
template <typename T>
double Value(uint32_t bits) {
  constexpr int kMantissa = Format<T>::kMantissaBits, kExponentBits = 15 - kMantissa;
  const int exponent = static_cast<int>(bits >> kMantissa) & ((1 << kExponentBits) - 1);
  const double fraction = bits & ((1u << kMantissa) - 1);
  const double sign = bits & 0x8000u ? -1.0 : 1.0;
  if (exponent == (1 << kExponentBits) - 1) return fraction == 0 ? sign * INFINITY : NAN;
  const double step = std::ldexp(1.0, Format<T>::kMinExponent - kMantissa);
  if (exponent == 0) return sign * fraction * step;
  return sign * std::ldexp(fraction + (1 << kMantissa), exponent - 1) * step;
}

TYPED_TEST(Float16Types, EveryPatternWidensExactly) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const double want = Value<TypeParam>(bits);
    const float got = ToFloat(TypeParam{static_cast<uint16_t>(bits)});
    if (std::isnan(want)) {
      ASSERT_TRUE(std::isnan(got)) << bits;
    } else {
      ASSERT_EQ(got, want) << bits;
      ASSERT_EQ(std::signbit(got), std::signbit(want)) << bits;
    }
  }
}

TYPED_TEST(Float16Types, EveryPatternSurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const TypeParam value{static_cast<uint16_t>(bits)};
    const TypeParam back = FromFloat<TypeParam>(ToFloat(value));
    if (std::isnan(ToFloat(value))) {
      ASSERT_TRUE(std::isnan(ToFloat(back))) << bits;
    } else {
      ASSERT_EQ(back.bits, bits);
    }
  }
}

// Between each two neighbours: the midpoint goes to the even one, anything else to the nearer.
TYPED_TEST(Float16Types, RoundsToNearestEvenBetweenAllNeighbours) {
  for (uint32_t bits = 0; bits + 1 < 0x8000u; ++bits) {
    const double low = Value<TypeParam>(bits), high = Value<TypeParam>(bits + 1);
    if (!std::isfinite(high)) break;
    const float middle = static_cast<float>((low + high) / 2);  // exact: one more bit of mantissa
    const uint32_t even = bits % 2 == 0 ? bits : bits + 1;
    ASSERT_EQ(FromFloat<TypeParam>(middle).bits, even) << bits;
    ASSERT_EQ(FromFloat<TypeParam>(-middle).bits, even | 0x8000u) << bits;
    ASSERT_EQ(FromFloat<TypeParam>(std::nextafter(middle, -INFINITY)).bits, bits);
    ASSERT_EQ(FromFloat<TypeParam>(std::nextafter(middle, INFINITY)).bits, bits + 1);
  }
}

TYPED_TEST(Float16Types, OverflowGivesInfinity) {
  const double max = Format<TypeParam>::kMax;
  const double half_step = std::ldexp(1.0, std::ilogb(max) - Format<TypeParam>::kMantissaBits - 1);
  const float limit = static_cast<float>(max + half_step);
  EXPECT_EQ(ToFloat(FromFloat<TypeParam>(std::nextafter(limit, 0.0f))), max);
  EXPECT_EQ(ToFloat(FromFloat<TypeParam>(limit)), INFINITY);
  EXPECT_EQ(ToFloat(FromFloat<TypeParam>(-limit)), -INFINITY);
  EXPECT_EQ(ToFloat(FromFloat<TypeParam>(INFINITY)), INFINITY);
}

TYPED_TEST(Float16Types, NanStaysNanWhateverItsPayload) {
  for (uint32_t payload :
       {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0x7f802000u, 0xff800001u, 0xffffffffu}) {
    EXPECT_TRUE(std::isnan(ToFloat(FromFloat<TypeParam>(BitsToFloat(payload))))) << payload;
  }
}

TYPED_TEST(Float16Types, RandomFloatsGoToANearestValue) {
  std::mt19937 engine(1);
  for (int i = 0; i < 200000; ++i) {
    const float value = BitsToFloat(static_cast<uint32_t>(engine()));
    const TypeParam rounded = FromFloat<TypeParam>(value);
    if (!std::isfinite(value) || !std::isfinite(ToFloat(rounded))) continue;
    const double error = std::abs(double{ToFloat(rounded)} - value);
    for (int step : {-1, 1}) {
      const double other = Value<TypeParam>(static_cast<uint16_t>(rounded.bits + step));
      if (!std::isfinite(other)) continue;
      ASSERT_LE(error, std::abs(other - value)) << value;
    }
  }
}

}  // namespace
}  // namespace tidal::test
