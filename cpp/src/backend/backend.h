// The seam between the algorithm and a device: memory, copies, and the fused ops of a transformer
// step.
//
// One Backend is one device and one stream of work, used by one thread at a time. Ops are queued in
// call order; none allocates, waits or returns a value. Every op has the same meaning on every
// backend (op_args.h); the CPU backend is the reference the others are tested against.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend/op_args.h"
#include "core/buffer.h"
#include "core/checked.h"
#include "tidal/config.h"
#include "tidal/device.h"
#include "tidal/memory_plan.h"
#include "tidal/plan.h"

namespace tidal {

struct BackendInfo {
  Device device;
  std::string name;                // "cpu", "cuda:0"
  int64_t total_bytes = 0;         // of its memory
  int64_t free_bytes = 0;          // memory that can be allocated now
  int64_t prefill_chunk = 0;       // prompt tokens per pass that run well here
  int64_t max_recorded_steps = 0;  // StepKeys whose steps are kept recorded; 0: none is recorded
  std::string prefill_attention;   // what does AttentionPrefill: "own kernel", "cuDNN 9.28.1"
};

// The largest step a decoder will ever run; the backend sizes its own scratch by it.
struct StepLimits {
  ModelConfig model;
  DType dtype = DType::kFloat32;
  DType kv_dtype = DType::kFloat32;
  int64_t max_batch_size = 0;
  int64_t max_seq_len = 0;
  int64_t prefill_chunk = 0;
  int64_t tokens_per_row = 1;  // of a step; more: it checks drafts, with AttentionPrefill
  int64_t page_size = 0;
  int64_t num_pages = 0;     // of the cache; 0: not known yet
  int64_t token_budget = 0;  // 0: dense only
  Granularity granularity = Granularity::kKvHead;
  Shadow shadow = Shadow::kNone;
  int64_t decoded_bytes = 0;       // of the largest weight of a layer in codes, as numbers
  int64_t quantized_inputs = 0;    // most inputs of a product that quantizes_inputs; 0: none does
  int64_t num_recorded_steps = 0;  // different StepKeys, at most max_recorded_steps
};

// Memory that a backend takes for itself.
struct BackendMemory {
  std::vector<MemoryItem> scratch;  // what Reserve allocates
  int64_t reserve_bytes = 0;        // what the device takes by itself: recorded steps, code
  int64_t host_bytes = 0;           // staging of copies in host memory, where that is not scratch
};

// Names a step whose work is the same each time but for the contents of its buffers.
struct StepKey {
  int64_t batch_size = 0;
  int64_t tokens_per_row = 1;
  PlanId plan = PlanId::kDense;
  bool operator==(const StepKey&) const = default;
};

// Adds to the item of the same purpose, if there is one.
inline void AddItem(std::vector<MemoryItem>& items, const MemoryItem& added) {
  for (MemoryItem& item : items) {
    if (item.purpose != added.purpose) continue;
    item.bytes = Sum({item.bytes, added.bytes});
    return;
  }
  items.push_back(added);
}

class Backend {
 public:
  virtual ~Backend() = default;

  virtual BackendInfo info() const = 0;
  virtual DType activation_dtype(DType weight_dtype) const = 0;
  // The dtype of what ScoreKeys writes from a shadow.
  virtual DType shadow_score_dtype() const = 0;
  // The longest context at which a step is no faster for reading token_budget positions in its
  // sparse layers. The same on every device of a kind: it decides what is computed.
  virtual int64_t SparseMinContext(int64_t token_budget) const = 0;
  // Whether Linear takes such a weight in codes; its addresses do not matter.
  virtual bool ReadsCodes(const Weight&) const { return false; }
  // Likewise ExpertLinear.
  virtual bool ReadsCodesOfExperts(const Weight& weight) const { return ReadsCodes(weight); }

  // --- memory; load time only ---
  // Zero-filled. `what` names the purpose, here and in the OutOfMemoryError.
  Buffer Allocate(int64_t bytes, const std::string& what) {
    Buffer buffer = DoAllocate(bytes, what);
    CountAllocation(bytes, what);
    return buffer;
  }
  // All that was ever allocated, scratch included, each purpose once.
  const std::vector<MemoryItem>& allocated() const { return allocated_; }
  // Checks that this backend runs the shapes (UnsupportedError) and says what Reserve would
  // allocate for them. Allocates nothing.
  virtual BackendMemory PlanReserve(const StepLimits& limits) const = 0;
  // Checks and allocates. May be called again for other steps of the same model.
  virtual void Reserve(const StepLimits& limits) = 0;
  // Two-phase upload of weights: the caller fills the returned host memory of `bytes` bytes, then
  // commits it to `dst` (device memory). The CPU hands out dst itself.
  virtual void* BeginUpload(void* dst, int64_t bytes) = 0;
  virtual void CommitUpload(void* dst, int64_t bytes) = 0;

  // --- copies, in order with the ops; host memory may be reused on return ---
  virtual void Upload(const TensorView& dst, const void* host) = 0;
  virtual void Download(void* host, const TensorView& src) = 0;  // returns when host is readable
  virtual void Copy(const TensorView& dst, const TensorView& src) = 0;  // apart, of equal size

  // Runs `step`, a pure function of device buffers at fixed addresses. A device may record it the
  // first times and replay it afterwards; results are the same bit for bit.
  virtual void RunStep(const StepKey& key, const std::function<void()>& step) = 0;
  // Drops what was recorded of steps through a plan, which will not run again. Does not throw.
  virtual void ForgetSteps(PlanId) {}

  // --- ops ---
  virtual void Embed(const EmbedArgs& args) = 0;
  virtual void RmsNorm(const RmsNormArgs& args) = 0;
  virtual void Linear(const LinearArgs& args) = 0;
  virtual void RopeTable(const RopeTableArgs& args) = 0;
  virtual void RopeAppendKv(const RopeAppendKvArgs& args) = 0;
  virtual void AttentionPrefill(const AttentionPrefillArgs& args) = 0;
  virtual void AttentionFull(const AttentionArgs& args) = 0;
  virtual void AttentionSelect(const AttentionSelectArgs& args) = 0;
  virtual void AppendShadow(const AppendShadowArgs& args) = 0;
  virtual void ScoreKeys(const ScoreKeysArgs& args) = 0;
  virtual void SelectTopK(const SelectTopKArgs& args) = 0;
  virtual void AttentionSparse(const AttentionSparseArgs& args) = 0;
  virtual void GateMul(const GateMulArgs& args) = 0;
  virtual void GateRows(const GateRowsArgs& args) = 0;
  virtual void SelectExperts(const SelectExpertsArgs& args) = 0;
  virtual void ExpertLinear(const ExpertLinearArgs& args) = 0;
  virtual void AddExperts(const AddExpertsArgs& args) = 0;
  virtual void ScaleLogits(const ScaleLogitsArgs& args) = 0;
  virtual void GatherRows(const GatherRowsArgs& args) = 0;
  virtual void Sample(const SampleArgs& args) = 0;
  virtual void Logprobs(const LogprobsArgs& args) = 0;

  // --- several ops in one: the results of the parts in turn, to rounding. Here they are the parts
  // in turn; a backend does better where it can ---
  virtual void NormLinear(const NormLinearArgs& args);
  virtual void QkvRopeAppend(const QkvRopeAppendArgs& args);
  virtual void GateUpMul(const GateUpMulArgs& args);
  virtual void ExpertMlp(const ExpertMlpArgs& args);
  virtual void AppendShadowScoreKeys(const AppendShadowScoreKeysArgs& args);

 protected:
  virtual Buffer DoAllocate(int64_t bytes, const std::string& what) = 0;
  void CountAllocation(int64_t bytes, const std::string& what) {
    AddItem(allocated_, {what, bytes});
  }

 private:
  std::vector<MemoryItem> allocated_;
};

// What does AttentionPrefill of more than a few queries on CUDA. The results are the same to
// rounding.
enum class PrefillAttention : int32_t {
  kOwn,
  // cuDNN, or an error that says why not. It multiplies what it masks by 0, so a NaN in a free slot
  // of a page, left by another sequence, reaches results: decoders do not use it.
  kCudnn,
};

struct BackendOptions {
  Device device;
  int32_t num_threads = 0;  // CPU; 0: one per processor it may use
  bool cuda_graphs = true;
  // Whether what the ops give for a token, or a row, is the same bit for bit whatever else is in
  // the call: in all ops that are called in steps (RunStep), be the token its row's only one or one
  // of several, and in all that are not. Changes nothing on the CPU, where that is always so in
  // calls of up to 64 tokens.
  bool batch_invariant = false;
  PrefillAttention prefill_attention = PrefillAttention::kOwn;
};

// Throws BackendError if the device is not available, with the reason and the remedy.
std::unique_ptr<Backend> MakeBackend(const BackendOptions& options);

// CPU only.
std::unique_ptr<Backend> MakeCpuBackend(const BackendOptions& options);

// The entry points of the CUDA backend's shared library (libtidal_cuda.so), found by name.
inline constexpr const char* kMakeCudaBackendSymbol = "tidal_make_cuda_backend";
inline constexpr const char* kListCudaDevicesSymbol = "tidal_list_cuda_devices";
using MakeCudaBackendFn = Backend* (*)(const BackendOptions& options);
// Appends to `devices` and to `libraries`.
using ListCudaDevicesFn = void (*)(std::vector<DeviceStatus>& devices,
                                   std::vector<std::pair<std::string, std::string>>& libraries);

}  // namespace tidal
