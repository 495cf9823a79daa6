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

#include "backend/op_args.h"
#include "core/buffer.h"
#include "tidal/decoder.h"

namespace tidal {

struct BackendInfo {
  Device device;
  std::string name;               // "cpu", "cuda:0"
  int64_t free_bytes = 0;         // memory that can be allocated now
  int64_t prefill_chunk = 0;      // prompt tokens per pass that run well here
  std::string prefill_attention;  // what does AttentionPrefill: "cuDNN 9.28.1", "own kernel (why)"
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
};

// Names a step whose work is the same each time but for the contents of its buffers.
struct StepKey {
  int64_t batch_size = 0;
  bool sparse = false;  // false: the all-full plan
  int64_t tokens_per_row = 1;
  bool operator==(const StepKey&) const = default;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual BackendInfo info() const = 0;
  virtual DType activation_dtype(DType weight_dtype) const = 0;
  // The longest context at which a step is no faster for reading token_budget positions in its
  // sparse layers. The same on every device of a kind: it decides what is computed.
  virtual int64_t SparseMinContext(int64_t token_budget) const = 0;

  // --- memory; load time only ---
  // Zero-filled. `what` names the purpose in the OutOfMemoryError.
  virtual Buffer Allocate(int64_t bytes, const std::string& what) = 0;
  // Checks that this backend runs the shapes (UnsupportedError) and allocates its scratch. May
  // be called again for other steps of the same model.
  virtual void Reserve(const StepLimits& limits) = 0;
  // Two-phase upload of weights: the caller fills the returned host memory of `bytes` bytes, then
  // commits it to `dst` (device memory). The CPU hands out dst itself.
  virtual void* BeginUpload(void* dst, int64_t bytes) = 0;
  virtual void CommitUpload(void* dst, int64_t bytes) = 0;

  // --- copies, in order with the ops; host memory may be reused on return ---
  virtual void Upload(const TensorView& dst, const void* host) = 0;
  virtual void Download(void* host, const TensorView& src) = 0;  // returns when host is readable

  // Runs `step`, a pure function of device buffers at fixed addresses. A device may record it the
  // first times and replay it afterwards; results are the same bit for bit. In a step, a
  // RopeAppendKv of as many tokens as rows appends the newest token of each row, at seq_len - 1.
  virtual void RunStep(const StepKey& key, const std::function<void()>& step) = 0;

  // --- ops ---
  virtual void Embed(const EmbedArgs& args) = 0;
  virtual void RmsNorm(const RmsNormArgs& args) = 0;
  virtual void Linear(const LinearArgs& args) = 0;
  virtual void RopeTable(const RopeTableArgs& args) = 0;
  virtual void RopeAppendKv(const RopeAppendKvArgs& args) = 0;
  virtual void AttentionPrefill(const AttentionPrefillArgs& args) = 0;
  virtual void AttentionFull(const AttentionArgs& args) = 0;
  virtual void AttentionSelect(const AttentionSelectArgs& args) = 0;
  virtual void SelectTopK(const SelectTopKArgs& args) = 0;
  virtual void AttentionSparse(const AttentionSparseArgs& args) = 0;
  virtual void SiluMul(const SiluMulArgs& args) = 0;
  virtual void GatherRows(const GatherRowsArgs& args) = 0;
  virtual void Sample(const SampleArgs& args) = 0;

  // --- several ops in one: the results of the parts in turn, to rounding. Here they are the parts
  // in turn; a backend does better where it can ---
  virtual void NormLinear(const NormLinearArgs& args);
  virtual void QkvRopeAppend(const QkvRopeAppendArgs& args);
  virtual void GateUpSiluMul(const GateUpSiluMulArgs& args);
};

// What does AttentionPrefill of more than a few queries on CUDA. The results are the same to
// rounding.
enum class PrefillAttention : int32_t {
  kAuto,   // cuDNN where it is installed and has the shapes, else the own kernel
  kOwn,    // the own kernel
  kCudnn,  // cuDNN, or an error that says why not
};

struct BackendOptions {
  Device device;
  int32_t num_threads = 0;  // CPU; 0: one per core
  bool cuda_graphs = true;
  PrefillAttention prefill_attention = PrefillAttention::kAuto;
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
