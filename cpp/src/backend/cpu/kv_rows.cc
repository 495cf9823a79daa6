#include "backend/cpu/kv_rows.h"

#include <cstring>

#include "core/float16.h"
#include "core/float8.h"
#include "core/int8_row.h"

namespace tidal {
namespace {

template <typename T>
void NarrowTo(const float* src, int64_t count, void* dst) {
  T* to = static_cast<T*>(dst);
  for (int64_t i = 0; i < count; ++i) to[i] = FromFloat<T>(src[i]);
}

}  // namespace

int64_t KvRow(const PagedKv& kv, int64_t seq, int64_t position, int64_t head) {
  const int64_t num_kv_heads = kv.k_pages.dim(1), page_size = kv.k_pages.dim(2);
  const int32_t* pages = kv.page_table.data<int32_t>() + seq * kv.page_table.dim(1);
  return (pages[position / page_size] * num_kv_heads + head) * page_size + position % page_size;
}

void StoreKvRow(const KvHalf& half, int64_t row, const float* x) {
  const int64_t head_dim = half.pages.dim(3);
  char* dst = static_cast<char*>(half.pages.ptr) + row * head_dim * DTypeBytes(half.pages.dtype);
  switch (half.pages.dtype) {
    case DType::kBFloat16:
      NarrowTo<BFloat16>(x, head_dim, dst);
      break;
    case DType::kFloat16:
      NarrowTo<Float16>(x, head_dim, dst);
      break;
    case DType::kInt8:
      half.scales.data<float>()[row] = EncodeInt8Row(x, head_dim, reinterpret_cast<int8_t*>(dst));
      break;
    case DType::kFloat8:
      EncodeFloat8Row(x, head_dim, half.scale, reinterpret_cast<Float8*>(dst));
      break;
    default:
      std::memcpy(dst, x, static_cast<size_t>(head_dim) * sizeof(float));
  }
}

void LoadKvRows(const CpuContext& context, const KvHalf& half, int64_t row, int64_t count,
                float* dst) {
  const int64_t head_dim = half.pages.dim(3);
  const char* src =
      static_cast<const char*>(half.pages.ptr) + row * head_dim * DTypeBytes(half.pages.dtype);
  context.kernels->widen[StorageIndex(half.pages.dtype)](src, count * head_dim, dst);
  if (half.scale != 1.0f) context.kernels->scale(dst, half.scale, count * head_dim, dst);
  if (!half.scales) return;
  for (int64_t i = 0; i < count; ++i) {
    float* x = dst + i * head_dim;
    context.kernels->scale(x, half.scales.data<float>()[row + i], head_dim, x);
  }
}

}  // namespace tidal
