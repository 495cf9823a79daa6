// The backend of one NVIDIA GPU: a stream, the scratch of its kernels, and the graphs of its steps.
//
// Weights and activations are of one 16-bit dtype, and so is the cache unless it is fp8; the
// residual stream is float32.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>

#include "backend/backend.h"
#include "common/attention_scratch.h"
#include "common/cache_reads.h"
#include "cuda_graphs.h"
#include "cuda_linear.h"
#include "cuda_memory.h"
#include "cudnn_attention.h"
#include "kernels/expert_choices.h"
#include "kernels/select_top_k.h"
#include "kernels/skinny_linear.h"

namespace tidal {

inline constexpr int kMinComputeCapability = 8;  // bf16 mma and cp.async; the major number

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(const BackendOptions& options);
  ~CudaBackend() override;

  BackendInfo info() const override;
  DType activation_dtype(DType weight_dtype) const override;
  // Codes of 4 bits are worth no more, and float32 would be a quarter of the traffic.
  DType shadow_score_dtype() const override { return DType::kFloat16; }
  int64_t SparseMinContext(int64_t token_budget) const override;
  bool ReadsCodes(const Weight& weight) const override;
  bool ReadsCodesOfExperts(const Weight& weight) const override;

  BackendMemory PlanReserve(const StepLimits& limits) const override;
  void Reserve(const StepLimits& limits) override;
  // One piece at a time, of at most 32 MiB: begin, fill, commit.
  void* BeginUpload(void* dst, int64_t bytes) override;
  void CommitUpload(void* dst, int64_t bytes) override;

  void Upload(const TensorView& dst, const void* host) override;
  void Download(void* host, const TensorView& src) override;
  void Copy(const TensorView& dst, const TensorView& src) override;
  void RunStep(const StepKey& key, const std::function<void()>& step) override;
  void ForgetSteps(PlanId plan) override {
    cudaSetDevice(device_);
    graphs_.Forget(plan);
  }

  void Embed(const EmbedArgs& args) override;
  void RmsNorm(const RmsNormArgs& args) override;
  void Linear(const LinearArgs& args) override;
  void RopeTable(const RopeTableArgs& args) override;
  void RopeAppendKv(const RopeAppendKvArgs& args) override;
  void AttentionPrefill(const AttentionPrefillArgs& args) override;
  void AttentionFull(const AttentionArgs& args) override;
  void AttentionSelect(const AttentionSelectArgs& args) override;
  void AppendShadow(const AppendShadowArgs& args) override;
  void ScoreKeys(const ScoreKeysArgs& args) override;
  void SelectTopK(const SelectTopKArgs& args) override;
  void AttentionSparse(const AttentionSparseArgs& args) override;
  void GateMul(const GateMulArgs& args) override;
  void GateRows(const GateRowsArgs& args) override;
  void SelectExperts(const SelectExpertsArgs& args) override;
  void ExpertLinear(const ExpertLinearArgs& args) override;
  void AddExperts(const AddExpertsArgs& args) override;
  void ScaleLogits(const ScaleLogitsArgs& args) override;
  void GatherRows(const GatherRowsArgs& args) override;
  void Sample(const SampleArgs& args) override;
  void Logprobs(const LogprobsArgs& args) override;
  void NormLinear(const NormLinearArgs& args) override;
  void QkvRopeAppend(const QkvRopeAppendArgs& args) override;
  void GateUpMul(const GateUpMulArgs& args) override;
  void ExpertMlp(const ExpertMlpArgs& args) override;
  void AppendShadowScoreKeys(const AppendShadowScoreKeysArgs& args) override;

 protected:
  Buffer DoAllocate(int64_t bytes, const std::string& what) override;

 private:
  static constexpr const char* kProductsPurpose = "matrix products";
  static constexpr const char* kDecodedPurpose = "weights decoded for prompts";
  static constexpr const char* kQuantizedPurpose = "inputs of products in fp8";
  static constexpr const char* kExpertsPurpose = "choices of experts";
  static constexpr const char* kDecodedPagesPurpose = "a layer's cache decoded for prompts";
  // Two of them: copy and file read overlap.
  static constexpr int64_t kWeightStagingBytes = 32 << 20;
  static constexpr int64_t kScalesAlignment = 256;

  // For the inputs of a product as numbers of 16 bits, or as codes with their scales behind them:
  // of 128 inputs, or more, each.
  static int64_t QuantizedInputsBytes(int64_t num_tokens, int64_t num_inputs) {
    return Sum({Product({2, num_tokens, num_inputs}), kScalesAlignment});
  }

  // Owns the stream, so that members using it are destroyed before it.
  class Stream {
   public:
    explicit Stream(int device);
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    cudaStream_t get() const { return stream_; }

   private:
    cudaStream_t stream_ = nullptr;
  };

  // Makes this device the thread's, and fails if the device has failed.
  void UseDevice() const;
  // Opens every op and copy: uses the device, and has attention that comes next read in order
  // unless this op says otherwise (AllowEarlyReads).
  void Enter();
  // As Enter, for what may not be part of a recorded step.
  void EnterOutsideStep(const char* what);
  cudaStream_t stream() const { return stream_.get(); }
  struct ReserveBytes {
    AttentionScratchSize attention;
    SelectTopKBytes selection;
    int64_t decoded_pages = 0;
    int64_t expert_order = 0;
    int64_t quantized_inputs = 0;
  };
  ReserveBytes BytesToReserve(const StepLimits& limits) const;
  // `scratch` with at least `bytes`, grown if an op is called with more than Reserve was told of;
  // zeros when it is new.
  void* Grow(Buffer& scratch, int64_t bytes, const char* what);
  SelectTopKScratch GrowSelection(const SelectTopKBytes& bytes);
  Splitting splitting() const { return batch_invariant_ ? Splitting::kByRow : Splitting::kByBatch; }
  void* GrowAttention(const AttentionScratchSize& size);
  // The scratch of an attention op with the queries q [T, Hq, D] of the rows of kv.
  AttentionScratch ScratchFor(const TensorView& q, const PagedKv& kv);
  // Whether the product, with its number of tokens, is one for kernels/skinny_linear.h.
  bool Streams(const LinearArgs& linear) const;
  void* LinearWorkspace();
  SkinnyRun NewRun() const;
  // The norm that makes a product's inputs: done, or left, wholly or in part, to the product.
  SkinnyRun NormBefore(const LinearArgs& linear, const RmsNormArgs& norm);
  void LinearAfter(const SkinnyRun& run, const LinearArgs& linear);
  void CodedLinear(const SkinnyRun& run, const LinearArgs& linear);
  void QuantizedLinear(const SkinnyRun& run, const LinearArgs& linear);
  bool MultipliedCodes(const LinearArgs& linear);
  // How many choices the kernel for such a product takes at once (kernels/expert_linear.h).
  int64_t ChoicesOfTile(const ExpertLinearArgs& args) const;
  // Scratch for the order of the product's choices.
  ExpertOrder OrderFor(const ExpertLinearArgs& args);
  // AttentionPrefill by cuDNN, if that is to do it and can; false: by the own kernel.
  bool PrefillByCudnn(const AttentionPrefillArgs& args);
  // AttentionPrefill of an fp8 cache: some rows at a time, whose pages are decoded first.
  void PrefillDecoded(const AttentionPrefillArgs& args);
  // After an op: whether decode attention, if it comes next, may read early (CacheReads).
  void AllowEarlyReads(bool allow) {
    next_reads_ = in_step_ && allow ? CacheReads::kEarly : CacheReads::kInOrder;
  }

  int device_;
  bool use_graphs_;
  bool batch_invariant_;
  int num_sms_ = 0;
  Stream stream_;
  CudaLinear linear_;
  std::optional<CudnnAttention> cudnn_attention_;  // if prompts are to be read with it
  GraphCache graphs_;
  Buffer attention_scratch_;
  int64_t attention_counter_bytes_ = 0;
  Buffer selection_keys_;
  Buffer selection_digits_;  // zeros between ops
  Buffer linear_workspace_;
  Buffer decoded_weight_;                          // of one product at a time
  Buffer quantized_inputs_;                        // likewise
  Buffer decoded_pages_;                           // of one layer at a time
  Buffer expert_order_;                            // likewise
  std::unique_ptr<PinnedStaging> weight_staging_;  // while weights are being loaded
  std::unique_ptr<PinnedStaging> input_staging_;
  Buffer download_;                          // pinned
  bool in_step_ = false;                     // ops are being called by the step that RunStep runs
  CacheReads reads_ = CacheReads::kInOrder;  // how the running op may read
  // How the next one may, as this one allows.
  CacheReads next_reads_ = CacheReads::kInOrder;
};

}  // namespace tidal
