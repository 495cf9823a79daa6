// Wires the seam (backend/backend.h) to the CPU ops: checks arguments, then calls. Memory is host
// memory and a step is simply run.
#include "backend/cpu/cpu_backend.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "backend/check_args.h"
#include "backend/cpu/attend_rows.h"
#include "backend/cpu/attention_prefill.h"
#include "backend/cpu/blas.h"
#include "backend/cpu/cpu_info.h"
#include "backend/cpu/linear.h"
#include "backend/cpu/ops.h"
#include "backend/cpu/select_top_k.h"
#include "backend/cpu/shadow.h"
#include "core/checked.h"
#include "core/container.h"
#include "tidal/error.h"

namespace tidal {
namespace {

// Prompt tokens of a pass: many enough for the matrix products to run at full speed, few enough
// that the activations of a layer stay in the last cache level.
constexpr int64_t kPrefillChunk = 1024;
constexpr int32_t kMaxThreads = 4096;
constexpr const char* kBlasPurpose = "buffers of OpenBLAS";

class CpuBackend final : public Backend {
 public:
  CpuBackend(const CpuKernels& kernels, int num_threads) {
    context_.kernels = &kernels;
    context_.num_threads = num_threads;
    context_.scratch.on_growth = [this](int64_t bytes) { CountAllocation(bytes, kScratchPurpose); };
  }
  CpuBackend(const CpuBackend&) = delete;  // the scratch holds its address
  CpuBackend& operator=(const CpuBackend&) = delete;

  BackendInfo info() const override {
    BackendInfo info;
    info.name = "cpu";
    HostMemory memory = ReadHostMemory();
    info.total_bytes = memory.total_bytes;
    info.free_bytes = memory.free_bytes;
    info.prefill_chunk = kPrefillChunk;
    return info;
  }
  DType activation_dtype(DType) const override { return DType::kFloat32; }
  DType shadow_score_dtype() const override { return DType::kFloat32; }
  // A sparse layer's time follows the positions it reads, from the first one it leaves out.
  int64_t SparseMinContext(int64_t token_budget) const override { return token_budget; }
  bool ReadsCodes(const Weight& weight) const override { return CpuReadsCodes(weight); }

  BackendMemory PlanReserve(const StepLimits& limits) const override {
    BackendMemory memory;
    memory.scratch = {{kScratchPurpose, ScratchBytes(context_.num_threads, limits)},
                      {kBlasPurpose, context_.num_threads * kBlasThreadBytes}};
    return memory;
  }
  void Reserve(const StepLimits& limits) override {
    ReserveScratch(context_, limits);
    if (blas_) return;
    context_.Pool();
    blas_.emplace(context_.num_threads);
    CountAllocation(context_.num_threads * kBlasThreadBytes, kBlasPurpose);
  }
  void* BeginUpload(void* dst, int64_t) override { return dst; }
  void CommitUpload(void*, int64_t) override {}
  void Upload(const TensorView& dst, const void* host) override {
    std::memcpy(dst.ptr, host, static_cast<size_t>(dst.bytes()));
  }
  void Download(void* host, const TensorView& src) override {
    std::memcpy(host, src.ptr, static_cast<size_t>(src.bytes()));
  }
  void Copy(const TensorView& dst, const TensorView& src) override {
    std::memcpy(dst.ptr, src.ptr, static_cast<size_t>(dst.bytes()));
  }
  void RunStep(const StepKey&, const std::function<void()>& step) override { step(); }

  void Embed(const EmbedArgs& args) override { Run(CpuEmbed, args); }
  void RmsNorm(const RmsNormArgs& args) override { Run(CpuRmsNorm, args); }
  void Linear(const LinearArgs& args) override { Run(CpuLinear, args); }
  void RopeTable(const RopeTableArgs& args) override { Run(CpuRopeTable, args); }
  void RopeAppendKv(const RopeAppendKvArgs& args) override { Run(CpuRopeAppendKv, args); }
  void AttentionPrefill(const AttentionPrefillArgs& args) override {
    Run(CpuAttentionPrefill, args);
  }
  void AttentionFull(const AttentionArgs& args) override { Run(CpuAttentionFull, args); }
  void AttentionSelect(const AttentionSelectArgs& args) override { Run(CpuAttentionSelect, args); }
  void AppendShadow(const AppendShadowArgs& args) override { Run(CpuAppendShadow, args); }
  void ScoreKeys(const ScoreKeysArgs& args) override { Run(CpuScoreKeys, args); }
  void SelectTopK(const SelectTopKArgs& args) override { Run(CpuSelectTopK, args); }
  void AttentionSparse(const AttentionSparseArgs& args) override { Run(CpuAttentionSparse, args); }
  void GateMul(const GateMulArgs& args) override { Run(CpuGateMul, args); }
  void GateRows(const GateRowsArgs& args) override { Run(CpuGateRows, args); }
  void SelectExperts(const SelectExpertsArgs& args) override { Run(CpuSelectExperts, args); }
  void ExpertLinear(const ExpertLinearArgs& args) override { Run(CpuExpertLinear, args); }
  void AddExperts(const AddExpertsArgs& args) override { Run(CpuAddExperts, args); }
  void ScaleLogits(const ScaleLogitsArgs& args) override { Run(CpuScaleLogits, args); }
  void GatherRows(const GatherRowsArgs& args) override { Run(CpuGatherRows, args); }
  void Sample(const SampleArgs& args) override { Run(CpuSample, args); }
  void Logprobs(const LogprobsArgs& args) override { Run(CpuLogprobs, args); }

 protected:
  Buffer DoAllocate(int64_t bytes, const std::string& what) override {
    return AllocateHostMemory(bytes, what);
  }

 private:
  template <typename Args>
  void Run(void (*op)(CpuContext&, const Args&), const Args& args) {
    Check(args, DType::kFloat32);
    op(context_, args);
  }

  CpuContext context_;
  std::optional<BlasThreads> blas_;
};

bool ProcessorHas([[maybe_unused]] CpuIsa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == CpuIsa::kAvx512Vnni) {
    return __builtin_cpu_supports("avx512vnni") && ProcessorHas(CpuIsa::kAvx512);
  }
  if (isa == CpuIsa::kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           ProcessorHas(CpuIsa::kAvx2);
  }
  // Every processor with AVX2 has F16C.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

}  // namespace

bool HasIsa(CpuIsa isa) {
  return isa == CpuIsa::kAuto || isa == CpuIsa::kGeneric || ProcessorHas(isa);
}

const CpuKernels& SelectKernels(CpuIsa isa) {
  TIDAL_CHECK(HasIsa(isa), UnsupportedError, "CPU backend: this processor has no ",
              isa == CpuIsa::kAvx2     ? "AVX2 with FMA"
              : isa == CpuIsa::kAvx512 ? "AVX-512 (F, BW, VL, DQ)"
                                       : "AVX-512 VNNI",
              "; use CpuIsa::kAuto");
#if defined(__x86_64__)
  auto is_chosen = [isa](CpuIsa one) {
    return isa == one || (isa == CpuIsa::kAuto && HasIsa(one));
  };
  if (is_chosen(CpuIsa::kAvx512Vnni)) return Avx512VnniKernels();
  if (is_chosen(CpuIsa::kAvx512)) return Avx512Kernels();
  if (is_chosen(CpuIsa::kAvx2)) return Avx2Kernels();
#endif
  return GenericKernels();
}

std::unique_ptr<Backend> MakeCpuBackend(const BackendOptions& options, CpuIsa isa) {
  TIDAL_CHECK(options.num_threads >= 0 && options.num_threads <= kMaxThreads, InvalidArgument,
              "num_threads: got ", options.num_threads, ", expected 0 to ", kMaxThreads,
              " (0: one per core)");
  TIDAL_CHECK(options.device.type == DeviceType::kCpu && options.device.index == 0, BackendError,
              "CPU backend: got ",
              options.device.type == DeviceType::kCpu ? "cpu:" : "cuda:", options.device.index,
              ", expected the one CPU; pass device=\"cpu\"");
  const int threads = options.num_threads > 0 ? options.num_threads : DefaultNumThreads();
  return std::make_unique<CpuBackend>(SelectKernels(isa), threads);
}

std::unique_ptr<Backend> MakeCpuBackend(const BackendOptions& options) {
  return MakeCpuBackend(options, CpuIsa::kAuto);
}

namespace {

// Calls visit(slot, count, element) for the scratch of every op at its largest; `element`, a value
// of the type, is only there for its type.
template <typename Visit>
void ForScratch(int num_threads, const StepLimits& limits, const Visit& visit) {
  const ModelConfig& model = limits.model;
  const int64_t rows = limits.max_batch_size;
  const int64_t head_dim = model.head_dim;
  const int64_t few = std::min(limits.tokens_per_row, kFewQueries);
  const int64_t choices =
      Product({std::max(limits.prefill_chunk, Product({rows, limits.tokens_per_row})),
               model.experts_per_token});
  const int64_t plan_bytes = std::max({Product({rows, static_cast<int64_t>(sizeof(AttendRow))}),
                                       ShadowQueryBytes(rows, model.num_q_heads, head_dim),
                                       4 * ChoiceInts(choices, model.num_experts)});
  visit(Scratch::kPlan, plan_bytes, char());
  visit(
      Scratch::kRecords,
      std::max(AttendRecordFloats(rows, few, model.num_q_heads, head_dim, limits.max_seq_len),
               AttendRecordFloats(1, kFewQueries, model.num_q_heads, head_dim, limits.max_seq_len)),
      float());
  const int64_t in_features = std::max({model.hidden_size, model.q_size(), model.intermediate_size,
                                        model.expert_intermediate_size, model.shared_expert_size});
  // Sample's candidates take two floats each.
  const int64_t thread_floats = std::max({LinearScratchFloats(in_features),
                                          PrefillScratchFloats(model.group_size(), head_dim),
                                          2 * model.vocab_size, model.kv_size() + 16});
  visit(Scratch::kThreads, num_threads * thread_floats, float());
  if (model.has_experts()) {
    const int64_t inner = model.expert_intermediate_size;
    visit(Scratch::kExperts,
          std::max(2 * model.num_experts, Product({choices, model.hidden_size + 2 * inner})),
          float());
  }
  if (limits.quantized_inputs > 0) {
    const int64_t tokens = std::max(rows, limits.prefill_chunk);
    visit(Scratch::kInputs, Product({tokens, limits.quantized_inputs}), float());
  }
  if (limits.token_budget > 0) {
    const int64_t sets = NumSets(limits.granularity, model.num_q_heads, model.num_kv_heads);
    visit(Scratch::kKeys, SelectScratchWords(rows * sets, limits.max_seq_len), uint32_t());
  }
}

}  // namespace

int64_t ScratchBytes(int num_threads, const StepLimits& limits) {
  int64_t bytes = 0;
  ForScratch(num_threads, limits, [&](Scratch::Slot, int64_t count, auto element) {
    bytes = Sum({bytes, Product({count, static_cast<int64_t>(sizeof(element))})});
  });
  return bytes;
}

void ReserveScratch(CpuContext& context, const StepLimits& limits) {
  ForScratch(context.num_threads, limits, [&](Scratch::Slot slot, int64_t count, auto element) {
    context.scratch.Take<decltype(element)>(slot, count);
  });
}

}  // namespace tidal
