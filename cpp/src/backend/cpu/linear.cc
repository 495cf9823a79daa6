// Linear: few rows by our own kernel at the speed of reading the weights, many rows by OpenBLAS.
#include <algorithm>
#include <cmath>

#include "backend/cpu/blas.h"
#include "backend/cpu/linear.h"
#include "backend/cpu/ops.h"
#include "core/float8.h"
#include "tidal/error.h"

namespace tidal {
namespace {

// Up to here the kernel for few rows runs, whose rows do not depend on each other (a batched decode
// step equals its rows alone); OpenBLAS picks its loops by shape and does not promise that.
constexpr int64_t kFewRows = 64;
// From here on codes become float32 once for all rows; fewer rows are done sooner than that.
constexpr int64_t kDecodedRows = 16;
constexpr int64_t kLineOutputs = 16;  // a cache line of `out`
// One thread's piece of a large product: the decoded weight panel (512 KiB at in_features 512)
// stays in L2, and 512 rows make decoding it a hundredth of the work.
constexpr int64_t kPanelRows = 512;
constexpr int64_t kPanelOutputs = 256;
// Groups of codes have whole vectors of every instruction set.
constexpr int64_t kCodesOfGroup = 32;

int64_t CeilDiv(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Place among the kernels that read weights.
int WeightIndex(const Weight& weight) {
  switch (weight.codes) {
    case WeightCodes::kFloat8:
      return 3;
    case WeightCodes::kInt4:
      return 4;
    case WeightCodes::kMxfp4:
      return 5;
    default:
      return StorageIndex(weight.data.dtype);
  }
}

const void* At(const TensorView& tensor, int64_t i) {
  return static_cast<const char*>(tensor.ptr) + i * DTypeBytes(tensor.dtype);
}

WeightRows RowsOf(const Weight& weight, int64_t begin, int64_t end) {
  WeightRows rows;
  rows.data = At(weight.data, begin * weight.data.dim(1));
  rows.num_outputs = end - begin;
  rows.in_features = rows.group_size = weight.num_inputs();
  if (!weight.is_coded()) return rows;
  rows.group_size = weight.group_size;
  rows.scales = At(weight.scales, begin);
  if (weight.zeros) rows.zeros = weight.zeros.data<uint8_t>() + begin;
  rows.scale_dtype = weight.scales.dtype;
  rows.group_stride = weight.group_stride > 0 ? weight.group_stride : weight.num_outputs();
  return rows;
}

// Outputs [begin, end) of few rows.
LinearTile TileOf(const LinearArgs& args, int64_t begin, int64_t end) {
  LinearTile tile;
  tile.x = args.x.data<float>();
  tile.weight = RowsOf(args.weight, begin, end);
  if (args.bias) tile.bias = At(args.bias, begin);
  tile.bias_dtype = args.bias.dtype;
  tile.out = args.out.data<float>() + begin;
  tile.num_rows = args.x.dim(0);
  tile.out_stride = args.weight.num_outputs();
  tile.accumulate = args.output == LinearOutput::kAccumulate;
  return tile;
}

void LinearFewRows(CpuContext& context, const LinearArgs& args) {
  const CpuKernels& kernels = *context.kernels;
  const int64_t num_outputs = args.weight.num_outputs(), in_features = args.x.dim(1);
  const int kind = WeightIndex(args.weight);
  const int threads = context.ThreadsFor(num_outputs * in_features);
  const bool decodes = args.weight.is_coded() && args.x.dim(0) >= kDecodedRows;
  const int64_t scratch_floats = decodes ? LinearScratchFloats(in_features) : 0;
  float* scratch = context.scratch.Take<float>(Scratch::kThreads, threads * scratch_floats);
  context.ParallelRange(threads, num_outputs, kLineOutputs, [&](int64_t begin, int64_t end) {
    if (!decodes) return kernels.linear[kind](TileOf(args, begin, end));
    float* numbers = scratch + ThreadIndex() * scratch_floats;
    for (int64_t first = begin; first < end; first += kLineOutputs) {
      LinearTile tile = TileOf(args, first, std::min(first + kLineOutputs, end));
      kernels.decode[kind](tile.weight, numbers);
      tile.weight.data = numbers;
      tile.weight.group_size = in_features;
      kernels.linear[StorageIndex(DType::kFloat32)](tile);
    }
  });
}

void AddBias(const CpuContext& context, const LinearArgs& args, int64_t output, int64_t count,
             float* bias, const SgemmArgs& product) {
  context.kernels->widen[StorageIndex(args.bias.dtype)](At(args.bias, output), count, bias);
  for (int64_t row = 0; row < product.m; ++row) {
    float* out = product.c + row * product.ldc;
    for (int64_t i = 0; i < count; ++i) out[i] += bias[i];
  }
}

// scratch: room for a decoded panel and a bias, of the calling thread.
void RunPanel(const CpuContext& context, const LinearArgs& args, int64_t row, int64_t output,
              float* scratch) {
  const int64_t in_features = args.x.dim(1);
  const int64_t num_outputs = args.weight.num_outputs();
  const int64_t count = std::min(kPanelOutputs, num_outputs - output);
  const WeightRows weight = RowsOf(args.weight, output, output + count);
  SgemmArgs product;
  product.m = std::min(kPanelRows, args.x.dim(0) - row);
  product.n = count;
  product.k = in_features;
  product.a = args.x.data<float>() + row * in_features;
  product.lda = in_features;
  if (args.weight.data.dtype == DType::kFloat32) {
    product.b = static_cast<const float*>(weight.data);
  } else {
    context.kernels->decode[WeightIndex(args.weight)](weight, scratch);
    product.b = scratch;
  }
  product.ldb = in_features;
  product.b_transposed = true;
  product.c = args.out.data<float>() + row * num_outputs + output;
  product.ldc = num_outputs;
  product.accumulate = args.output == LinearOutput::kAccumulate;
  Sgemm(product);
  if (args.bias) {
    AddBias(context, args, output, count, scratch + kPanelOutputs * in_features, product);
  }
}

void LinearManyRows(CpuContext& context, const LinearArgs& args) {
  const int64_t row_panels = CeilDiv(args.x.dim(0), kPanelRows);
  const int64_t output_panels = CeilDiv(args.weight.num_outputs(), kPanelOutputs);
  const int64_t scratch_floats = LinearScratchFloats(args.x.dim(1));
  float* scratch =
      context.scratch.Take<float>(Scratch::kThreads, context.num_threads * scratch_floats);
  const int threads = context.ThreadsForProduct(args.x.numel() * args.weight.num_outputs());
  context.ParallelFor(threads, row_panels * output_panels, [&](int64_t task) {
    RunPanel(context, args, task % row_panels * kPanelRows, task / row_panels * kPanelOutputs,
             scratch + ThreadIndex() * scratch_floats);
  });
}

// x [count] as what its codes under a scale stand for.
void RoundInputs(const float* x, int64_t count, float scale, float* out) {
  if (scale == 0.0f) {
    float largest = 0.0f;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(x[i]));
    scale = Float8Scale(largest);
  }
  for (int64_t i = 0; i < count; ++i) out[i] = Float8ToFloat(FloatToFloat8(x[i] / scale)) * scale;
}

// The product of the inputs that are multiplied in place of x.
LinearArgs WithRoundedInputs(CpuContext& context, const LinearArgs& args) {
  const int64_t num_tokens = args.x.dim(0), in = args.x.dim(1), group = args.weight.group_size;
  const auto* x = args.x.data<float>();
  float* rounded = context.scratch.Take<float>(Scratch::kInputs, args.x.numel());
  context.ParallelFor(context.ThreadsFor(args.x.numel()), num_tokens, [&](int64_t token) {
    for (int64_t begin = token * in, end = begin + in; begin < end; begin += group) {
      RoundInputs(x + begin, std::min(group, end - begin), args.weight.input_scale,
                  rounded + begin);
    }
  });
  LinearArgs product = args;
  product.x = TensorView(rounded, DType::kFloat32, {num_tokens, in});
  product.quantizes_inputs = false;
  return product;
}

}  // namespace

int64_t LinearScratchFloats(int64_t in_features) {
  return kPanelOutputs * (in_features + 1);
}

bool CpuReadsCodes(const Weight& weight) {
  const int64_t group = weight.group_size;
  return group == weight.num_inputs() || group % kCodesOfGroup == 0;
}

void CpuLinear(CpuContext& context, const LinearArgs& args) {
  TIDAL_CHECK(!args.weight.is_coded() || CpuReadsCodes(args.weight), UnsupportedError,
              "Linear: a weight in codes in groups of ", args.weight.group_size,
              " inputs; expected a multiple of ", kCodesOfGroup, " or all inputs");
  if (args.quantizes_inputs) {
    CpuLinear(context, WithRoundedInputs(context, args));
  } else if (args.x.dim(0) <= kFewRows) {
    LinearFewRows(context, args);
  } else {
    LinearManyRows(context, args);
  }
}

}  // namespace tidal
