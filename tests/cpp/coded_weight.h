// A random matrix in codes (backend/op_args.h, Weight), and what it means by the definition.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "backend_test.h"
#include "core/float8.h"

namespace tidal::test {

// How a matrix is kept.
struct CodesCase {
  std::string name;
  WeightCodes codes = WeightCodes::kFloat8;
  int64_t group_size = 0;  // 0: a whole row
  DType scale_dtype = DType::kFloat32;
  bool has_zeros = false;
};

struct CodedMatrix {
  Bytes codes, zeros;
  Values scales;  // [groups, outputs]
  Values values;  // [outputs, inputs]
  int64_t group_size = 0;

  // Values of standard deviation about `size`.
  static CodedMatrix Make(Random& random, const CodesCase& how, const std::vector<int64_t>& shape,
                          double size) {
    const int64_t outputs = shape[0], inputs = shape[1];
    const bool is_int4 = how.codes == WeightCodes::kInt4;
    CodedMatrix made;
    made.group_size = how.group_size == 0 ? inputs : how.group_size;
    const int64_t groups = (inputs + made.group_size - 1) / made.group_size;
    for (int32_t code : random.Below(outputs * inputs / (is_int4 ? 2 : 1), 256)) {
      const bool is_nan = !is_int4 && (code & 127) == 127;
      made.codes.push_back(static_cast<uint8_t>(is_nan ? code - 1 : code));
    }
    if (how.has_zeros) {
      for (int32_t zero : random.Below(groups * outputs, 16)) {
        made.zeros.push_back(static_cast<uint8_t>(zero));
      }
    }
    const double rms = is_int4 ? 4.6 : 107.0;
    made.scales = random.Normal(groups * outputs, how.scale_dtype, 0.2 * size / rms, size / rms);
    for (int64_t n = 0; n < outputs; ++n) {
      for (int64_t k = 0; k < inputs; ++k) {
        const auto place = static_cast<size_t>(k / made.group_size * outputs + n);
        const auto code = made.codes[static_cast<size_t>((n * inputs + k) / (is_int4 ? 2 : 1))];
        const int zero = how.has_zeros ? made.zeros[place] : 8;
        const double value = is_int4 ? ((code >> (k % 2 * 4)) & 15) - zero : Float8ToFloat(code);
        made.values.push_back(value * made.scales[place]);
      }
    }
    return made;
  }
};

}  // namespace tidal::test
