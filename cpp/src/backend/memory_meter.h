// MemoryMeter: a backend without memory. What is made on it allocates nothing and shows in
// allocated() what it would take of the backend behind it.
#pragma once

#include <string>

#include "backend/backend.h"
#include "tidal/error.h"

namespace tidal {

class MemoryMeter : public Backend {
 public:
  // `measured` must outlive it.
  explicit MemoryMeter(const Backend& measured) : measured_(measured) {}

  BackendInfo info() const override { return measured_.info(); }
  DType activation_dtype(DType dtype) const override { return measured_.activation_dtype(dtype); }
  DType shadow_score_dtype() const override { return measured_.shadow_score_dtype(); }
  int64_t SparseMinContext(int64_t token_budget) const override {
    return measured_.SparseMinContext(token_budget);
  }
  bool ReadsCodes(const Weight& weight) const override { return measured_.ReadsCodes(weight); }
  bool ReadsCodesOfExperts(const Weight& weight) const override {
    return measured_.ReadsCodesOfExperts(weight);
  }
  BackendMemory PlanReserve(const StepLimits& limits) const override {
    return measured_.PlanReserve(limits);
  }
  void Reserve(const StepLimits& limits) override {
    for (const MemoryItem& item : PlanReserve(limits).scratch) {
      CountAllocation(item.bytes, item.purpose);
    }
  }

  void* BeginUpload(void*, int64_t) override { Refuse(); }
  void CommitUpload(void*, int64_t) override { Refuse(); }
  void Upload(const TensorView&, const void*) override { Refuse(); }
  void Download(void*, const TensorView&) override { Refuse(); }
  void Copy(const TensorView&, const TensorView&) override { Refuse(); }
  void RunStep(const StepKey&, const std::function<void()>&) override { Refuse(); }
  void Embed(const EmbedArgs&) override { Refuse(); }
  void RmsNorm(const RmsNormArgs&) override { Refuse(); }
  void Linear(const LinearArgs&) override { Refuse(); }
  void RopeTable(const RopeTableArgs&) override { Refuse(); }
  void RopeAppendKv(const RopeAppendKvArgs&) override { Refuse(); }
  void AttentionPrefill(const AttentionPrefillArgs&) override { Refuse(); }
  void AttentionFull(const AttentionArgs&) override { Refuse(); }
  void AttentionSelect(const AttentionSelectArgs&) override { Refuse(); }
  void AppendShadow(const AppendShadowArgs&) override { Refuse(); }
  void ScoreKeys(const ScoreKeysArgs&) override { Refuse(); }
  void SelectTopK(const SelectTopKArgs&) override { Refuse(); }
  void AttentionSparse(const AttentionSparseArgs&) override { Refuse(); }
  void GateMul(const GateMulArgs&) override { Refuse(); }
  void GateRows(const GateRowsArgs&) override { Refuse(); }
  void SelectExperts(const SelectExpertsArgs&) override { Refuse(); }
  void ExpertLinear(const ExpertLinearArgs&) override { Refuse(); }
  void AddExperts(const AddExpertsArgs&) override { Refuse(); }
  void ScaleLogits(const ScaleLogitsArgs&) override { Refuse(); }
  void GatherRows(const GatherRowsArgs&) override { Refuse(); }
  void Sample(const SampleArgs&) override { Refuse(); }
  void Logprobs(const LogprobsArgs&) override { Refuse(); }

 protected:
  Buffer DoAllocate(int64_t, const std::string&) override { return Buffer(); }

 private:
  [[noreturn]] static void Refuse() {
    throw BackendError("memory meter: it has no memory to copy or compute in");
  }

  const Backend& measured_;
};

}  // namespace tidal
