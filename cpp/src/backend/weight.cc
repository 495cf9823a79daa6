// Weight: part of a larger one.
#include "backend/op_args.h"

namespace tidal {

Weight Weight::Rows(int64_t begin, int64_t count) const {
  Weight rows = *this;
  rows.data = data.Rows(begin, count);
  if (!is_coded()) return rows;
  rows.group_stride = group_stride == 0 ? num_outputs() : group_stride;
  auto columns = [&](const TensorView& table) {
    char* first = static_cast<char*>(table.ptr) + begin * DTypeBytes(table.dtype);
    return TensorView(first, table.dtype, {table.dim(0), count});
  };
  rows.scales = columns(scales);
  if (zeros) rows.zeros = columns(zeros);
  return rows;
}

}  // namespace tidal
