// The ops that treat tokens one by one: Embed, RmsNorm, RopeTable, RopeAppendKv, GateMul,
// ScaleLogits, GatherRows.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "backend/cpu/kv_rows.h"
#include "backend/cpu/ops.h"

namespace tidal {
namespace {

// Calls body(t) for the tokens of a pass; `elements` are those of one token.
template <typename Body>
void ForTokens(CpuContext& context, int64_t num_tokens, int64_t elements, const Body& body) {
  const int threads = context.ThreadsFor(num_tokens * elements);
  context.ParallelRange(threads, num_tokens, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(t);
  });
}

// The heads of a token's q or k.
struct Heads {
  int64_t count;
  int64_t dim;
  TensorView norm;  // [dim], [count * dim] or absent
  const float* cos_sin;
};

// Normalised if there is a norm, of each head or of all together, then rotated.
void NormAndRotate(const CpuContext& context, const float* x, const Heads& heads, float eps,
                   float* out) {
  const int64_t size = heads.count * heads.dim;
  if (heads.norm) {
    const auto norm = context.kernels->rms_norm[StorageIndex(heads.norm.dtype)];
    const int64_t width = heads.norm.dim(0);
    for (int64_t i = 0; i < size; i += width) norm(x + i, heads.norm.ptr, width, eps, out + i);
    x = out;
  }
  for (int64_t i = 0; i < size; i += heads.dim) {
    context.kernels->rotate_half(x + i, heads.cos_sin, heads.dim, out + i);
  }
}

// `rotated`: [Hkv * D] floats of the calling thread.
void AppendToken(const CpuContext& context, const RopeAppendKvArgs& args, int64_t t,
                 float* rotated) {
  const int64_t num_q_heads = args.q.dim(1), head_dim = args.q.dim(2);
  const int64_t num_kv_heads = args.kv.k_pages.dim(1);
  const float* qkv = args.qkv.data<float>() + t * args.qkv.dim(1);
  const float* cos_sin = args.cos_sin.data<float>() + t * head_dim;
  const float* q_cos_sin = args.q_cos_sin ? args.q_cos_sin.data<float>() + t * head_dim : cos_sin;
  NormAndRotate(context, qkv, {num_q_heads, head_dim, args.q_norm, q_cos_sin}, args.norm_eps,
                args.q.data<float>() + t * num_q_heads * head_dim);
  const int64_t position = args.positions.data<int32_t>()[t];
  if (position < 0) return;
  const int64_t seq = args.seq_idx.data<int32_t>()[t];
  const float* k = qkv + num_q_heads * head_dim;
  const float* v = k + num_kv_heads * head_dim;
  NormAndRotate(context, k, {num_kv_heads, head_dim, args.k_norm, cos_sin}, args.norm_eps, rotated);
  for (int64_t h = 0; h < num_kv_heads; ++h) {
    const int64_t row = KvRow(args.kv, seq, position, h);
    StoreKvRow(KeysOf(args.kv), row, rotated + h * head_dim);
    StoreKvRow(ValuesOf(args.kv), row, v + h * head_dim);
  }
}

// Scales a token's rotation for its query.
void WriteQueryTable(const CpuContext& context, const RopeTableArgs& args, int64_t t) {
  if (!args.q_cos_sin) return;
  const int64_t size = args.cos_sin.dim(1);
  const int32_t position = std::max(args.positions.data<int32_t>()[t], 0);
  const int64_t lengths = position / args.original_len;
  const float scale = 1.0f + args.query_scale_beta * std::log(1.0f + static_cast<float>(lengths));
  context.kernels->scale(args.cos_sin.data<float>() + t * size, scale, size,
                         args.q_cos_sin.data<float>() + t * size);
}

}  // namespace

void CpuEmbed(CpuContext& context, const EmbedArgs& args) {
  const int64_t size = args.table.dim(1);
  const int64_t row_bytes = size * DTypeBytes(args.table.dtype);
  const auto widen = context.kernels->widen[StorageIndex(args.table.dtype)];
  ForTokens(context, args.token_ids.dim(0), size, [&](int64_t t) {
    const int64_t token = args.token_ids.data<int32_t>()[t];
    float* out = args.out.data<float>() + t * size;
    widen(static_cast<const char*>(args.table.ptr) + token * row_bytes, size, out);
    if (args.scale != 1.0f) context.kernels->scale(out, args.scale, size, out);
  });
}

void CpuRmsNorm(CpuContext& context, const RmsNormArgs& args) {
  const int64_t size = args.x.dim(1);
  if (!args.weight) {
    std::memcpy(args.out.ptr, args.x.ptr, static_cast<size_t>(args.x.bytes()));
    return;
  }
  const auto norm = context.kernels->rms_norm[StorageIndex(args.weight.dtype)];
  // x is scratch where what it becomes is added.
  const TensorView& normed = args.adds ? args.x : args.out;
  ForTokens(context, args.x.dim(0), size, [&](int64_t t) {
    float* row = normed.data<float>() + t * size;
    norm(args.x.data<float>() + t * size, args.weight.ptr, size, args.eps, row);
    if (!args.adds) return;
    float* out = args.out.data<float>() + t * size;
    for (int64_t i = 0; i < size; ++i) out[i] += row[i];
  });
}

void CpuRopeTable(CpuContext& context, const RopeTableArgs& args) {
  const int64_t half = args.inv_freq.dim(1);
  // A sine takes about as long as touching 16 floats.
  ForTokens(context, args.positions.dim(0), 32 * half, [&](int64_t t) {
    float* out = args.cos_sin.data<float>() + t * 2 * half;
    const int32_t position = args.positions.data<int32_t>()[t];
    if (position < 0) {
      std::memset(out, 0, static_cast<size_t>(2 * half) * sizeof(float));
      WriteQueryTable(context, args, t);
      return;
    }
    const int64_t seq = args.seq_idx.data<int32_t>()[t];
    const float* inv_freq = args.inv_freq.data<float>() + seq * half;
    for (int64_t i = 0; i < half; ++i) {
      // The angle is rounded to float32, as transformers does.
      const float angle = static_cast<float>(position) * inv_freq[i];
      const float scaling = inv_freq[i] == 0.0f ? 1.0f : args.attention_scaling;
      out[i] = std::cos(angle) * scaling;
      out[half + i] = std::sin(angle) * scaling;
    }
    WriteQueryTable(context, args, t);
  });
}

void CpuRopeAppendKv(CpuContext& context, const RopeAppendKvArgs& args) {
  // Whole cache lines, so that no two threads write to one.
  const int64_t stride = (args.kv.k_pages.dim(1) * args.q.dim(2) + 15) / 16 * 16;
  float* rotated = context.scratch.Take<float>(Scratch::kThreads, context.num_threads * stride);
  ForTokens(context, args.qkv.dim(0), args.qkv.dim(1),
            [&](int64_t t) { AppendToken(context, args, t, rotated + ThreadIndex() * stride); });
}

void CpuGateMul(CpuContext& context, const GateMulArgs& args) {
  const int64_t size = args.out.dim(1);
  // A row of a decode step is cut too: exp and division make an element cost about four.
  const int threads = context.ThreadsFor(4 * args.out.numel());
  constexpr int64_t kPiece = 1024;
  const int64_t pieces = (size + kPiece - 1) / kPiece;
  context.ParallelRange(threads, args.out.dim(0) * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / pieces, first = i % pieces * kPiece;
      const float* gate = args.gate_up.data<float>() + t * 2 * size + first;
      const int64_t count = size - first < kPiece ? size - first : kPiece;
      context.kernels->gate_mul[static_cast<size_t>(args.activation)](
          {.gate = gate,
           .up = gate + size,
           .count = count,
           .out = args.out.data<float>() + t * size + first,
           .limit = args.limit,
           .alpha = args.alpha});
    }
  });
}

void CpuScaleLogits(CpuContext& context, const ScaleLogitsArgs& args) {
  const int64_t size = args.logits.dim(1);
  ForTokens(context, args.logits.dim(0), size, [&](int64_t r) {
    float* row = args.logits.data<float>() + r * size;
    context.kernels->scale(row, args.scale, size, row);
    context.kernels->softcap(row, args.softcap, size);
  });
}

void CpuGatherRows(CpuContext& context, const GatherRowsArgs& args) {
  const int64_t size = args.x.dim(1);
  ForTokens(context, args.rows.dim(0), size, [&](int64_t r) {
    const int64_t row = args.rows.data<int32_t>()[r];
    std::memcpy(args.out.data<float>() + r * size, args.x.data<float>() + row * size,
                static_cast<size_t>(size) * sizeof(float));
  });
}

}  // namespace tidal
