// The ops of the seam on one GPU: arguments are checked, scratch is handed out, kernels are
// launched. Kernels: kernels/*.cu; matrix products: cuda_linear.cc; replayed steps: cuda_graphs.cc;
// copies: cuda_copies.cc.
#include "cuda_backend.h"

#include <algorithm>
#include <utility>

#include "backend/check_args.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/head_dims.h"
#include "common/launch_config.h"
#include "cuda_dtypes.h"
#include "kernels/append_shadow.h"
#include "kernels/attention_full.h"
#include "kernels/attention_select.h"
#include "kernels/attention_sparse.h"
#include "kernels/decode_pages.h"
#include "kernels/embed.h"
#include "kernels/expert_choices.h"
#include "kernels/gate_mul.h"
#include "kernels/gather_rows.h"
#include "kernels/rms_norm.h"
#include "kernels/rope_append_kv.h"
#include "kernels/rope_table.h"
#include "kernels/scale_logits.h"
#include "kernels/score_keys.h"
#include "kernels/score_shadow.h"
#include "kernels/select_top_k.h"

namespace tidal {
namespace {

constexpr int64_t kInputStagingBytes = 1 << 20;  // the inputs of several steps
constexpr int64_t kDownloadBytes = 4 << 20;      // logits come in pieces of this size
// Purposes of memory.
constexpr const char* kAttentionPurpose = "attention";
constexpr const char* kSelectionPurpose = "selection";

// What the device itself takes: at least the most kernels of a layer and around the layers in one
// step, each with the driver's memory for a launch in a graph; and the code of kernels, ours and
// the libraries', as they are first used. The test of the plan in tests/python/test_gpu.py compares
// it with what the device then really has less.
constexpr int64_t kLaunchesPerLayer = 15;  // a scored layer, and biases of o and down
constexpr int64_t kLaunchesOfExperts = 8;  // more than those of one MLP
constexpr int64_t kLaunchesPerStep = 8;
constexpr int64_t kBytesPerLaunch = 64 << 10;
constexpr int64_t kCodeBytes = 256 << 20;

// For Llama-3.1-8B's shape 0.6 GB of activations. An H200 reads a prompt of 32K in such chunks 2 %
// slower than in one (docs/performance.md).
constexpr int64_t kPrefillChunk = 4096;
constexpr int64_t kMaxSeqLen = int64_t{1} << 30;  // positions are int32 on the device

int Attribute(int device, cudaDeviceAttr name) {
  int value = 0;
  TIDAL_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// The device's index, once it is known to exist and to be new enough.
int CheckDevice(int device) {
  int count = 0;
  TIDAL_CUDA_CHECK(cudaGetDeviceCount(&count));
  TIDAL_CHECK(device >= 0 && device < count, BackendError, "cuda:", device, ": there are ", count,
              " CUDA devices, cuda:0 to cuda:", count - 1);
  int major = Attribute(device, cudaDevAttrComputeCapabilityMajor);
  int minor = Attribute(device, cudaDevAttrComputeCapabilityMinor);
  TIDAL_CHECK(major >= kMinComputeCapability, UnsupportedError, "cuda:", device,
              ": compute capability ", major, ".", minor,
              "; expected 8.0 or newer (A100, RTX 30 series); use device=\"cpu\"");
  return device;
}

void CheckShadowScores(const char* op, const TensorView& scores) {
  TIDAL_CHECK(scores.dtype == DType::kFloat16, UnsupportedError, op,
              ": scores: ", DTypeName(scores.dtype), " with a shadow on CUDA; expected float16");
}

void CheckLimits(const StepLimits& limits) {
  const ModelConfig& model = limits.model;
  CheckDType(limits.dtype, "dtype");
  TIDAL_CHECK(limits.kv_dtype == limits.dtype || limits.kv_dtype == DType::kFloat8,
              UnsupportedError, "kv_dtype: ", DTypeName(limits.kv_dtype), " with ",
              DTypeName(limits.dtype), " weights; on CUDA expected ", DTypeName(limits.dtype),
              " or fp8");
  CheckHeadDim("model", model.head_dim, limits.dtype);
  TIDAL_CHECK(model.num_kv_heads > 0 && model.num_q_heads % model.num_kv_heads == 0 &&
                  model.group_size() <= kMaxGroupSize,
              UnsupportedError, "num_q_heads: ", model.num_q_heads, " over ", model.num_kv_heads,
              " KV heads on CUDA; expected 1 to ", kMaxGroupSize,
              " query heads for each KV head (or use device=\"cpu\")");
  int64_t page = limits.page_size;
  TIDAL_CHECK(page >= 8 && page <= 256 && (page & (page - 1)) == 0, UnsupportedError,
              "page_size: ", page, " on CUDA; expected 8, 16, 32, 64, 128 or 256");
  TIDAL_CHECK(limits.max_seq_len <= kMaxSeqLen, UnsupportedError,
              "max_seq_len: ", limits.max_seq_len, "; expected at most ", kMaxSeqLen);
}

}  // namespace

CudaBackend::Stream::Stream(int device) {
  TIDAL_CUDA_CHECK(cudaSetDevice(device));
  TIDAL_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
}

CudaBackend::Stream::~Stream() {
  cudaStreamDestroy(stream_);
}

CudaBackend::CudaBackend(const BackendOptions& options)
    : device_(CheckDevice(options.device.index)),
      use_graphs_(options.cuda_graphs),
      batch_invariant_(options.batch_invariant),
      num_sms_(Attribute(device_, cudaDevAttrMultiProcessorCount)),
      stream_(device_),
      linear_(stream_.get(), options.batch_invariant),
      graphs_(stream_.get()),
      input_staging_(std::make_unique<PinnedStaging>(kInputStagingBytes, stream_.get(),
                                                     "staging of step inputs")),
      download_(AllocatePinned(kDownloadBytes, "staging of results")) {
  if (options.prefill_attention == PrefillAttention::kCudnn) {
    cudnn_attention_.emplace(device_, stream());
  }
}

CudaBackend::~CudaBackend() {
  // Members are freed after this; the device must not be using them. Errors were or are reported by
  // checked calls.
  cudaSetDevice(device_);
  cudaStreamSynchronize(stream());
}

BackendInfo CudaBackend::info() const {
  UseDevice();
  size_t free_bytes = 0, total_bytes = 0;
  TIDAL_CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
  BackendInfo info;
  info.device = {DeviceType::kCuda, device_};
  info.name = Concat("cuda:", device_);
  info.total_bytes = static_cast<int64_t>(total_bytes);
  info.free_bytes = static_cast<int64_t>(free_bytes);
  info.prefill_chunk = kPrefillChunk;
  info.max_recorded_steps = use_graphs_ ? GraphCache::kMaxGraphs : 0;
  info.prefill_attention = "own kernel";
  if (cudnn_attention_) {
    const std::string& problem = cudnn_attention_->problem();
    info.prefill_attention =
        problem.empty() ? "cuDNN " + CudnnAttention::LibraryVersion() : "none: " + problem;
  }
  return info;
}

DType CudaBackend::activation_dtype(DType weight_dtype) const {
  CheckDType(weight_dtype, "dtype");
  return weight_dtype;
}

int64_t CudaBackend::SparseMinContext(int64_t token_budget) const {
  // Llama-3.1-8B shapes, H200, budget 1024: with 8 sequences both are as fast at 2048 tokens, with
  // one at about 1536 (docs/performance.md). Below that the latency of the kernels decides, which
  // grows with neither context nor budget.
  constexpr int64_t kLeast = 2048;
  return std::max(2 * token_budget, kLeast);
}

void CudaBackend::UseDevice() const {
  TIDAL_CUDA_CHECK(cudaSetDevice(device_));
  TIDAL_CUDA_CHECK(cudaPeekAtLastError());
}

void CudaBackend::Enter() {
  UseDevice();
  reads_ = std::exchange(next_reads_, CacheReads::kInOrder);
}

void CudaBackend::EnterOutsideStep(const char* what) {
  Enter();
  TIDAL_CHECK(!graphs_.recording(), BackendError, what,
              " inside a recorded step; a step may only queue ops");
}

// --- memory ---

Buffer CudaBackend::DoAllocate(int64_t bytes, const std::string& what) {
  EnterOutsideStep("memory allocation");
  Buffer buffer = AllocateDevice(device_, bytes, what);
  if (bytes > 0) {
    TIDAL_CUDA_CHECK(cudaMemsetAsync(buffer.data(), 0, static_cast<size_t>(bytes), stream()));
  }
  return buffer;
}

CudaBackend::ReserveBytes CudaBackend::BytesToReserve(const StepLimits& limits) const {
  const ModelConfig& model = limits.model;
  ReserveBytes bytes;
  bytes.attention = SizeOfAttentionScratch(splitting(), limits.max_batch_size, model.num_q_heads,
                                           model.head_dim, num_sms_);
  if (limits.token_budget > 0) {
    int64_t num_sets = NumSets(limits.granularity, model.num_q_heads, model.num_kv_heads);
    bytes.selection = SelectTopKScratchBytes(limits.max_batch_size * num_sets, limits.max_seq_len);
  }
  if (model.has_experts()) {
    const int64_t steps = limits.max_batch_size * limits.tokens_per_row;
    const int64_t tokens = std::max(steps, limits.prefill_chunk);
    bytes.expert_order = ExpertOrder::OrderBytes(tokens * model.experts_per_token);
  }
  if (limits.quantized_inputs > 0) {
    const int64_t tokens = std::max(limits.prefill_chunk, limits.max_batch_size);
    bytes.quantized_inputs = QuantizedInputsBytes(tokens, limits.quantized_inputs);
  }
  if (limits.kv_dtype == DType::kFloat8) {
    bytes.decoded_pages =
        DecodedRowBytes(limits.max_seq_len, model.num_kv_heads, limits.page_size, model.head_dim);
  }
  return bytes;
}

BackendMemory CudaBackend::PlanReserve(const StepLimits& limits) const {
  CheckLimits(limits);
  UseDevice();
  ReserveBytes bytes = BytesToReserve(limits);
  BackendMemory memory;
  memory.scratch = {{kAttentionPurpose, bytes.attention.Total()},
                    {kProductsPurpose, kLinearWorkspaceBytes}};
  if (limits.decoded_bytes > 0) memory.scratch.push_back({kDecodedPurpose, limits.decoded_bytes});
  if (bytes.quantized_inputs > 0) {
    memory.scratch.push_back({kQuantizedPurpose, bytes.quantized_inputs});
  }
  if (bytes.decoded_pages > 0) {
    memory.scratch.push_back({kDecodedPagesPurpose, bytes.decoded_pages});
  }
  if (bytes.expert_order > 0) memory.scratch.push_back({kExpertsPurpose, bytes.expert_order});
  int64_t selection = bytes.selection.keys + bytes.selection.first_digits;
  if (selection > 0) memory.scratch.push_back({kSelectionPurpose, selection});
  int64_t of_layer = kLaunchesPerLayer + (limits.model.has_experts() ? kLaunchesOfExperts : 0);
  int64_t launches = limits.model.num_layers * of_layer + kLaunchesPerStep;
  memory.reserve_bytes = kCodeBytes + limits.num_recorded_steps * launches * kBytesPerLaunch;
  memory.host_bytes = 2 * (kWeightStagingBytes + kInputStagingBytes) + kDownloadBytes;
  return memory;
}

void CudaBackend::Reserve(const StepLimits& limits) {
  CheckLimits(limits);
  EnterOutsideStep("reservation of scratch");
  ReserveBytes bytes = BytesToReserve(limits);
  GrowAttention(bytes.attention);
  GrowSelection(bytes.selection);
  Grow(linear_workspace_, kLinearWorkspaceBytes, kProductsPurpose);
  Grow(decoded_weight_, limits.decoded_bytes, kDecodedPurpose);
  Grow(quantized_inputs_, bytes.quantized_inputs, kQuantizedPurpose);
  Grow(decoded_pages_, bytes.decoded_pages, kDecodedPagesPurpose);
  Grow(expert_order_, bytes.expert_order, kExpertsPurpose);
  if (!cudnn_attention_ || limits.num_pages == 0) return;
  const ModelConfig& model = limits.model;
  cudnn_attention_->Prepare({.dtype = limits.dtype,
                             .batch_size = 1,
                             .max_q_len = limits.prefill_chunk,
                             .num_q_heads = model.num_q_heads,
                             .num_kv_heads = model.num_kv_heads,
                             .head_dim = model.head_dim,
                             .num_pages = limits.num_pages,
                             .page_size = limits.page_size,
                             .max_pages = CeilDiv(limits.max_seq_len, limits.page_size)});
}

void* CudaBackend::Grow(Buffer& scratch, int64_t bytes, const char* what) {
  if (scratch.bytes() >= bytes) return scratch.data();
  TIDAL_CHECK(!graphs_.recording(), BackendError, what, ": ", scratch.bytes(), " bytes, but ",
              bytes,
              " are needed inside a recorded step; Reserve must be told of the largest step");
  TIDAL_CUDA_CHECK(cudaStreamSynchronize(stream()));  // queued ops may be using the old memory
  graphs_.Clear();                                    // and recorded ones hold its address
  scratch = Buffer();
  scratch = Allocate(bytes, what);
  return scratch.data();
}

SelectTopKScratch CudaBackend::GrowSelection(const SelectTopKBytes& bytes) {
  return {.keys = Grow(selection_keys_, bytes.keys, kSelectionPurpose),
          .first_digits = Grow(selection_digits_, bytes.first_digits, kSelectionPurpose)};
}

// The room for counters never shrinks, or later ops would count where partial results lay. More of
// it takes the place of partial results, so it comes with new memory, which is zeros.
void* CudaBackend::GrowAttention(const AttentionScratchSize& size) {
  const int64_t more = size.counter_bytes - attention_counter_bytes_;
  int64_t bytes = size.Total() - std::min<int64_t>(more, 0);
  if (more > 0) bytes = std::max(bytes, attention_scratch_.bytes() + more);
  void* memory = Grow(attention_scratch_, bytes, kAttentionPurpose);
  attention_counter_bytes_ += std::max<int64_t>(more, 0);
  return memory;
}

AttentionScratch CudaBackend::ScratchFor(const TensorView& q, const PagedKv& kv) {
  void* memory = GrowAttention(
      SizeOfAttentionScratch(splitting(), kv.seq_lens.dim(0), q.dim(1), q.dim(2), num_sms_));
  return {.memory = memory,
          .bytes = attention_scratch_.bytes(),
          .counter_bytes = attention_counter_bytes_,
          .num_sms = num_sms_,
          .splitting = splitting()};
}

// --- steps and ops ---

void CudaBackend::RunStep(const StepKey& key, const std::function<void()>& step) {
  EnterOutsideStep("a step");
  // For as long as the step's ops are called, whether or not one of them throws. What the ops
  // before it and after it write and read is anyone's guess.
  struct Scope {
    CudaBackend& backend;
    explicit Scope(CudaBackend& on) : backend(on) { Set(true); }
    ~Scope() { Set(false); }
    void Set(bool in_step) {
      backend.in_step_ = in_step;
      backend.AllowEarlyReads(false);
    }
  };
  auto ops = [&] {
    Scope scope(*this);
    step();
  };
  if (use_graphs_) {
    graphs_.Run(key, ops);
  } else {
    ops();
  }
}

// --- ops ---

void CudaBackend::Embed(const EmbedArgs& args) {
  Enter();
  Check(args);
  LaunchEmbed(args, stream());
}

void CudaBackend::RmsNorm(const RmsNormArgs& args) {
  Enter();
  Check(args);
  if (!args.adds) CheckNormDType("rms_norm", args.out, args.weight);
  LaunchRmsNorm(args, LaunchNext::kAfterWait, stream());
}

void CudaBackend::RopeTable(const RopeTableArgs& args) {
  Enter();
  Check(args);
  LaunchRopeTable(args, stream());
}

void CudaBackend::RopeAppendKv(const RopeAppendKvArgs& args) {
  Enter();
  Check(args);
  CheckSameDType("rope_append_kv", {&args.q, &args.qkv});
  CheckNormDType("rope_append_kv", args.q, args.q_norm);
  CheckNormDType("rope_append_kv", args.q, args.k_norm);
  CheckCacheDType("rope_append_kv", args.q, args.kv);
  LaunchRopeAppendKv(args, stream());
  AllowEarlyReads(args.appended == Appended::kNewestOfEachRow);
}

void CudaBackend::AttentionFull(const AttentionArgs& args) {
  Enter();
  Check(args);
  CheckSameDType("attention_full", args);
  LaunchAttentionFull(args, ScratchFor(args.q, args.kv), reads_, stream());
  AllowEarlyReads(args.q.dim(0) > 0);  // without rows nothing is launched
}

void CudaBackend::AttentionSelect(const AttentionSelectArgs& args) {
  Enter();
  Check(args);
  CheckSameDType("attention_select", args.attention);
  LaunchAttentionSelect(args, ScratchFor(args.attention.q, args.attention.kv), reads_, stream());
  AllowEarlyReads(args.attention.q.dim(0) > 0);
}

void CudaBackend::AppendShadow(const AppendShadowArgs& args) {
  Enter();
  Check(args);
  CheckCacheDType("append_shadow", args.kv.k_pages, args.kv);
  LaunchAppendShadow(args, stream());
}

void CudaBackend::ScoreKeys(const ScoreKeysArgs& args) {
  Enter();
  Check(args);
  CheckCacheDType("score_keys", args.q, args.kv);
  if (args.shadow.codes) {
    CheckShadowScores("score_keys", args.scores);
    LaunchScoreShadow(args, NewestShadow::kIsThere, ScratchFor(args.q, args.kv), reads_, stream());
  } else {
    LaunchScoreKeys(args, ScratchFor(args.q, args.kv), reads_, stream());
  }
  // As after attention: this writes nothing that attention reads, and all its blocks wait for what
  // is in front.
  AllowEarlyReads(args.q.dim(0) > 0);
}

void CudaBackend::SelectTopK(const SelectTopKArgs& args) {
  Enter();
  Check(args);
  int64_t num_sets = args.token_idx.dim(0) * args.token_idx.dim(1);
  LaunchSelectTopK(args, GrowSelection(SelectTopKScratchBytes(num_sets, args.scores.dim(2))),
                   stream());
}

void CudaBackend::AttentionSparse(const AttentionSparseArgs& args) {
  Enter();
  Check(args);
  CheckSameDType("attention_sparse", args.attention);
  LaunchAttentionSparse(args, ScratchFor(args.attention.q, args.attention.kv), reads_, stream());
  AllowEarlyReads(args.attention.q.dim(0) > 0);
}

void CudaBackend::GateMul(const GateMulArgs& args) {
  Enter();
  Check(args);
  CheckSameDType("gate_mul", {&args.out, &args.gate_up});
  LaunchGateMul(args, stream());
}

void CudaBackend::ScaleLogits(const ScaleLogitsArgs& args) {
  Enter();
  Check(args);
  LaunchScaleLogits(args, stream());
}

void CudaBackend::GatherRows(const GatherRowsArgs& args) {
  Enter();
  Check(args);
  LaunchGatherRows(args, stream());
}

void CudaBackend::AppendShadowScoreKeys(const AppendShadowScoreKeysArgs& args) {
  Enter();
  Check(args);
  const ScoreKeysArgs& score = args.score;
  CheckCacheDType("append_shadow_score_keys", score.q, score.kv);
  CheckShadowScores("append_shadow_score_keys", score.scores);
  LaunchScoreShadow(score, NewestShadow::kWrite, ScratchFor(score.q, score.kv), reads_, stream());
  AllowEarlyReads(score.q.dim(0) > 0);  // as after ScoreKeys
}

}  // namespace tidal
