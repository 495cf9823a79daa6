// A random matrix in codes (backend/op_args.h, Weight), and what it means by the definition.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "backend_test.h"
#include "core/float8.h"
#include "core/mxfp4.h"

namespace tidal::test {

// How a matrix is kept.
struct CodesCase {
  std::string name;
  WeightCodes codes = WeightCodes::kFloat8;
  int64_t group_size = 0;               // 0: a whole row
  DType scale_dtype = DType::kFloat32;  // uint8 of MXFP4, whose scales are powers of 2
  bool has_zeros = false;
};

struct CodedMatrix {
  Bytes codes, zeros;
  Values scales;  // [groups, outputs]
  Values values;  // [outputs, inputs]
  int64_t group_size = 0;

  // As a Weight has them.
  Bytes ScaleBytes(DType dtype) const {
    if (dtype != DType::kUInt8) return Encode(scales, dtype);
    Bytes bytes;
    for (double scale : scales) bytes.push_back(static_cast<uint8_t>(std::ilogb(scale) + 127));
    return bytes;
  }

  // Values of standard deviation about `size`.
  static CodedMatrix Make(Random& random, const CodesCase& how, const std::vector<int64_t>& shape,
                          double size) {
    const int64_t outputs = shape[0], inputs = shape[1];
    const bool is_float8 = how.codes == WeightCodes::kFloat8;
    CodedMatrix made;
    made.group_size = how.group_size == 0 ? inputs : how.group_size;
    const int64_t groups = (inputs + made.group_size - 1) / made.group_size;
    for (int32_t code : random.Below(outputs * inputs * CodeBits(how.codes) / 8, 256)) {
      const bool is_nan = is_float8 && (code & 127) == 127;
      made.codes.push_back(static_cast<uint8_t>(is_nan ? code - 1 : code));
    }
    if (how.has_zeros) {
      for (int32_t zero : random.Below(groups * outputs, 16)) {
        made.zeros.push_back(static_cast<uint8_t>(zero));
      }
    }
    made.scales = RandomScales(random, how, groups * outputs, size);
    for (int64_t n = 0; n < outputs; ++n) {
      for (int64_t k = 0; k < inputs; ++k) {
        const auto place = static_cast<size_t>(k / made.group_size * outputs + n);
        const auto byte =
            made.codes[static_cast<size_t>((n * inputs + k) * CodeBits(how.codes) / 8)];
        const int zero = how.has_zeros ? made.zeros[place] : 8;
        const int half = (byte >> (k % 2 * 4)) & 15;
        const double value = is_float8                         ? Float8ToFloat(byte)
                             : how.codes == WeightCodes::kInt4 ? half - zero
                                                               : kFloat4Values[half];
        made.values.push_back(value * made.scales[place]);
      }
    }
    return made;
  }

 private:
  static Values RandomScales(Random& random, const CodesCase& how, int64_t count, double size) {
    const double rms = how.codes == WeightCodes::kFloat8 ? 107.0
                       : how.codes == WeightCodes::kInt4 ? 4.6
                                                         : 2.9;
    if (how.codes != WeightCodes::kMxfp4) {
      return random.Normal(count, how.scale_dtype, 0.2 * size / rms, size / rms);
    }
    Values powers;
    for (int32_t more : random.Below(count, 4)) {
      powers.push_back(std::ldexp(1.0, std::ilogb(size / rms) + more - 2));
    }
    return powers;
  }
};

}  // namespace tidal::test
