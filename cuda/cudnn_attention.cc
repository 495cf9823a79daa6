// cuDNN's attention through its C++ frontend: one graph of one SDPA operation for each shape.
// https://github.com/NVIDIA/cudnn-frontend, docs/operations/Attention.md. The only file that
// includes the frontend: it takes half a minute to compile.
#include "cudnn_attention.h"

#include <cudnn_frontend.h>
#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <exception>
#include <limits>
#include <unordered_map>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "cuda_memory.h"

namespace cudnn_frontend {
// With NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING the frontend looks all of cuDNN up in this library.
void* cudnn_dlhandle = nullptr;
}  // namespace cudnn_frontend

namespace tidal {
namespace {

namespace fe = cudnn_frontend;

constexpr const char* kLibraryName = "libcudnn.so.9";
constexpr size_t kLeastVersion = 90700;  // packed queries with a paged cache

// Names of the graph's tensors.
enum TensorId : int64_t {
  kQ = 1,
  kK,
  kV,
  kOut,
  kScale,
  kQLens,
  kKvLens,
  kKTable,
  kVTable,
  kOffsets,
};

std::string VersionText(size_t version) {  // 92801 -> "9.28.1"
  return Concat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

struct OpenedLibrary {
  std::string version;  // empty: it cannot be used
  std::string problem;
};

const OpenedLibrary& OpenLibrary() {
  static const OpenedLibrary library = [] {
    OpenedLibrary opened;
    void* handle = dlopen(kLibraryName, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      opened.problem = Concat(dlerror(), "; pip install 'nvidia-cudnn-cu13>=9.7,<10'");
      return opened;
    }
    auto get_version = reinterpret_cast<size_t (*)()>(dlsym(handle, "cudnnGetVersion"));
    size_t version = get_version == nullptr ? 0 : get_version();
    if (version < kLeastVersion) {
      opened.problem = Concat("cuDNN ", VersionText(version), ", expected at least ",
                              VersionText(kLeastVersion));
      return opened;
    }
    fe::cudnn_dlhandle = handle;  // never closed: the frontend keeps addresses
    opened.version = VersionText(version);
    return opened;
  }();
  return library;
}

// A tensor of a graph; the last dimension is contiguous.
std::shared_ptr<fe::graph::Tensor_attributes> Declare(fe::graph::Graph& graph, TensorId id,
                                                      fe::DataType_t type,
                                                      const std::vector<int64_t>& shape,
                                                      const std::vector<int64_t>& stride) {
  auto attributes = fe::graph::Tensor_attributes();
  attributes.set_uid(id).set_data_type(type).set_dim(shape).set_stride(stride);
  return graph.tensor(attributes);
}

std::shared_ptr<fe::graph::Tensor_attributes> DeclareInts(fe::graph::Graph& graph, TensorId id,
                                                          int64_t rows, int64_t columns) {
  return Declare(graph, id, fe::DataType_t::INT32, {rows, 1, columns, 1}, {columns, columns, 1, 1});
}

// Every tensor begins on as many bytes, as the graph promises cuDNN.
constexpr int64_t kAlignment = 16;

bool IsAligned(const TensorView& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.ptr) % kAlignment == 0;
}

// Elements from one array of RowExtents to the next, each of up to B + 1.
int64_t ExtentStride(int64_t batch_size) {
  constexpr auto kStep = kAlignment / static_cast<int64_t>(sizeof(int32_t));
  return CeilDiv(batch_size + 1, kStep) * kStep;
}

}  // namespace

struct CudnnAttention::Library {
  cudnnHandle_t handle = nullptr;

  ~Library() {
    if (handle != nullptr) fe::detail::destroy_handle(handle);
  }
};

struct CudnnAttention::Plan {
  fe::graph::Graph graph;
  std::string problem;  // not empty: cuDNN has no such plan
};

CudnnAttention::CudnnAttention(int device, cudaStream_t stream)
    : device_(device), stream_(stream), problem_(OpenLibrary().problem) {}

CudnnAttention::~CudnnAttention() = default;

std::string CudnnAttention::LibraryVersion() {
  return OpenLibrary().version;
}

std::string CudnnAttention::LibraryProblem() {
  return OpenLibrary().problem;
}

void CudnnAttention::Prepare(const CudnnAttentionShape& shape) {
  if (OpenLibrary().version.empty()) return;
  prepared_q_len_ = shape.max_q_len;
  problem_ = PlanFor(shape).problem;
}

bool CudnnAttention::Run(const AttentionPrefillArgs& args) {
  if (OpenLibrary().version.empty()) return false;
  CudnnAttentionShape shape = ShapeOf(args);
  Plan& plan = PlanFor(shape);
  problem_ = plan.problem;
  if (problem_.empty() &&
      !(IsAligned(args.q) && IsAligned(args.out) && IsAligned(args.kv.page_table))) {
    problem_ = Concat("cuDNN: a tensor does not begin on a multiple of ", kAlignment, " bytes");
  }
  if (!problem_.empty()) return false;

  RowExtents extents = ExtentsOf(shape.batch_size);
  LaunchRowExtents(args.q_starts, args.kv.seq_lens, shape.num_q_heads * shape.head_dim, extents,
                   stream_);
  float sm_scale = args.rule.sm_scale;
  std::unordered_map<int64_t, void*> tensors = {
      {kQ, args.q.ptr},
      {kK, args.kv.k_pages.ptr},
      {kV, args.kv.v_pages.ptr},
      {kOut, args.out.ptr},
      {kScale, &sm_scale},
      {kQLens, extents.q_lens},
      {kKvLens, extents.kv_lens},
      {kKTable, args.kv.page_table.ptr},
      {kVTable, args.kv.page_table.ptr},
      {kOffsets, extents.q_offsets},
  };
  auto status = plan.graph.execute(library_->handle, tensors, workspace_.data());
  TIDAL_CHECK(status.is_good(), BackendError, "cuDNN: attention_prefill: ", status.get_message());
  return true;
}

// Chunks are of the prepared length but for the last, so that one plan does for them all; longer
// ones get plans for powers of two.
CudnnAttentionShape CudnnAttention::ShapeOf(const AttentionPrefillArgs& args) const {
  auto longest = std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(args.max_q_len, 1)));
  return {.dtype = args.q.dtype,
          .batch_size = args.kv.seq_lens.dim(0),
          .max_q_len =
              args.max_q_len <= prepared_q_len_ ? prepared_q_len_ : static_cast<int64_t>(longest),
          .num_q_heads = args.q.dim(1),
          .num_kv_heads = args.kv.k_pages.dim(1),
          .head_dim = args.q.dim(2),
          .num_pages = args.kv.k_pages.dim(0),
          .page_size = args.kv.k_pages.dim(2),
          .max_pages = args.kv.page_table.dim(1)};
}

CudnnAttention::Plan& CudnnAttention::PlanFor(const CudnnAttentionShape& shape) {
  auto found = plans_.find(shape);
  if (found == plans_.end()) {
    std::unique_ptr<Plan> plan;
    try {
      plan = MakePlan(shape);
    } catch (const TidalError&) {
      throw;
    } catch (const std::exception& error) {  // the frontend's own, of symbols it does not find
      plan = std::make_unique<Plan>();
      plan->problem = error.what();
    }
    if (!plan->problem.empty()) {
      plan->problem = Concat("cuDNN ", OpenLibrary().version, ": ", plan->problem);
    }
    found = plans_.emplace(shape, std::move(plan)).first;
  }
  return *found->second;
}

std::unique_ptr<CudnnAttention::Plan> CudnnAttention::MakePlan(const CudnnAttentionShape& shape) {
  auto plan = std::make_unique<Plan>();
  int64_t b = shape.batch_size, hq = shape.num_q_heads, hkv = shape.num_kv_heads,
          d = shape.head_dim, longest = shape.max_pages * shape.page_size;
  if (b * shape.max_q_len * hq * d > std::numeric_limits<int32_t>::max() ||
      longest > std::numeric_limits<int32_t>::max()) {
    plan->problem = "positions of elements do not fit into 32 bits";
    return plan;
  }
  if (library_ == nullptr) {
    auto library = std::make_unique<Library>();
    auto status = fe::detail::create_handle(&library->handle);
    if (status == CUDNN_STATUS_SUCCESS) status = fe::detail::set_stream(library->handle, stream_);
    if (status != CUDNN_STATUS_SUCCESS) {
      plan->problem = Concat("cudnnCreate: ", fe::detail::get_error_string(status));
      return plan;
    }
    library_ = std::move(library);
  }
  int major = 0, minor = 0;
  TIDAL_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_));
  TIDAL_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_));

  // The frontend asks the shared CUDA runtime for the device, and what is being recorded, unless it
  // is told; ours is linked statically, and the shared one may not be there.
  fe::graph::Graph& graph = plan->graph;
  auto type = shape.dtype == DType::kBFloat16 ? fe::DataType_t::BFLOAT16 : fe::DataType_t::HALF;
  graph.set_io_data_type(type)
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT)
      .set_sm_version(major * 10 + minor)
      .set_cuda_graph_retention(fe::CudaGraphRetention_t::NONE);

  // Packed: row b's queries begin at offsets[b], whatever the stride of the first dimension says.
  const std::vector<int64_t> q_shape = {b, hq, shape.max_q_len, d};
  const std::vector<int64_t> q_stride = {shape.max_q_len * hq * d, d, hq * d, 1};
  const std::vector<int64_t> kv_shape = {shape.num_pages, hkv, shape.page_size, d};
  const std::vector<int64_t> kv_stride = {hkv * shape.page_size * d, shape.page_size * d, d, 1};
  auto offsets = Declare(graph, kOffsets, fe::DataType_t::INT32, {b + 1, 1, 1, 1}, {1, 1, 1, 1});
  auto q = Declare(graph, kQ, type, q_shape, q_stride);
  q->set_ragged_offset(offsets);
  auto k = Declare(graph, kK, type, kv_shape, kv_stride);
  auto v = Declare(graph, kV, type, kv_shape, kv_stride);
  auto scale = Declare(graph, kScale, fe::DataType_t::FLOAT, {1, 1, 1, 1}, {1, 1, 1, 1});
  scale->set_is_pass_by_value(true);

  auto attention = fe::graph::SDPA_attributes();
  attention.set_name("attention_prefill")
      .set_generate_stats(false)
      .set_attn_scale(scale)
      .set_padding_mask(true)
      .set_seq_len_q(DeclareInts(graph, kQLens, b, 1))
      .set_seq_len_kv(DeclareInts(graph, kKvLens, b, 1))
      .set_paged_attention_k_table(DeclareInts(graph, kKTable, b, shape.max_pages))
      .set_paged_attention_v_table(DeclareInts(graph, kVTable, b, shape.max_pages))
      .set_paged_attention_max_seq_len_kv(static_cast<int>(longest))
      // A row's queries are the last of its positions.
      .set_diagonal_alignment(fe::DiagonalAlignment_t::BOTTOM_RIGHT)
      .set_diagonal_band_right_bound(0);
  auto [out, stats] = graph.sdpa(q, k, v, attention);
  out->set_output(true).set_uid(kOut).set_dim(q_shape).set_stride(q_stride);
  out->set_ragged_offset(offsets);

  auto status = graph.build(library_->handle, {fe::HeurMode_t::A, fe::HeurMode_t::FALLBACK});
  int64_t workspace_bytes = 0;
  if (status.is_good()) status = graph.get_workspace_size(workspace_bytes);
  if (status.is_bad()) {
    plan->problem = status.get_message();
    return plan;
  }
  Grow(workspace_, workspace_bytes, "workspace of cuDNN");
  Grow(extents_, 3 * ExtentStride(b) * static_cast<int64_t>(sizeof(int32_t)), "extents of rows");
  return plan;
}

RowExtents CudnnAttention::ExtentsOf(int64_t batch_size) const {
  auto* first = static_cast<int32_t*>(extents_.data());
  int64_t stride = ExtentStride(batch_size);
  return {.q_lens = first, .kv_lens = first + stride, .q_offsets = first + 2 * stride};
}

void CudnnAttention::Grow(Buffer& buffer, int64_t bytes, const char* what) {
  if (buffer.bytes() >= bytes) return;
  TIDAL_CUDA_CHECK(cudaStreamSynchronize(stream_));  // queued ops may be using the old memory
  buffer = Buffer();
  buffer = AllocateDevice(device_, bytes, what);
}

}  // namespace tidal
