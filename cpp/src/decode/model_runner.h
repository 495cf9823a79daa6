// ModelRunner: a model on a device with everything a pass needs. Turns a Batch into what was drawn;
// knows nothing of calls, stop rules, sessions or threads (engine/).
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "decode/active_plan.h"
#include "decode/batch.h"
#include "decode/runner_buffers.h"
#include "decode/transformer.h"
#include "kv/host_pages.h"
#include "kv/paged_kv_cache.h"
#include "kv/shadow_cache.h"
#include "model/weights.h"

namespace tidal {

class ModelRunner {
 public:
  // Throws as Decoder's constructor.
  ModelRunner(const ModelConfig& model, const DecodeConfig& config, const WeightSource& weights,
              const LoadProgress& progress);

  const ModelConfig& model() const { return model_; }
  const DecodeConfig& config() const { return config_; }
  PagePool& pool() { return cache_->pool(); }
  const MemoryPlan& memory_plan() const { return memory_plan_; }
  // All that was allocated on the device so far, by purpose.
  const std::vector<MemoryItem>& allocated() const { return backend_->allocated(); }

  // What the caller does while a device works on a batch, or before a CPU does.
  using Meanwhile = std::function<void()>;

  // Copies pages as asked, caches the batch's tokens, in order of its rows, and draws. Moves each
  // sequence's `cached`, and what it says of the tokens before, past them; its tokens stay as they
  // are. Each draw goes by the sequence's tokens before it, those that are not cached included.
  // Throws InvalidArgument for a batch that CheckBatch refuses, CapacityError for one of more rows
  // or tokens than a pass has room for, and for a row without pages for its tokens.
  Drawn Run(
      const Batch& batch, const Meanwhile& meanwhile = [] {});

  // Adds a plan beside the decoder's, or a user to the plan with these settings if there is one.
  // Until its last user drops it, it has memory of its own, and where steps are recorded so are
  // its. Throws InvalidArgument, OutOfMemoryError.
  PlanId AddPlan(const PlanConfig& asked);
  // Takes a user from a plan that AddPlan gave.
  void DropPlan(PlanId id) noexcept;
  const ActivePlan& plan(PlanId id) const { return *plans_.at(id); }

  // Whether the engine drafts and checks.
  bool verifies() const;
  // Whether prompts are read with rounded inputs of products. Then tokens that are decoded have
  // other K and V than those that are read.
  bool quantizes_prompts() const { return config_.activation_format == KeepActivations::kFloat8; }

  // What the choosing layers chose for the sequence in the last sparse step through a plan; empty
  // if the sequence took no part.
  std::vector<LayerSelection> ReadSelection(PlanId id, uint64_t sequence_id) const;

  // Greedy parameters for rows whose draw nobody keeps.
  SamplingRow ScratchSampling() const { return buffers_->sampler.scratch_row(); }

  // The most tokens of a pass, prompts' chunks and checks of drafts alike.
  int64_t max_pass_tokens() const { return buffers_->passes.largest().num_tokens; }

  // Whole pages, as SequencePages::Own asks for.
  void CopyPages(const std::vector<PageCopy>& copies);

  // Pages in host memory that a batch may name.
  int64_t num_host_pages() const { return host_pages_->num_pages(); }

  // Puts random K and V into pages of the sequences that never had any, for measuring.
  void FillCache(const std::vector<Sequence>& sequences, uint64_t seed);

 private:
  void Warm();
  void WarmStep(const StepKey& key);
  void CheckFits(const Batch& batch) const;

  // Brings the slots of the rows that draw up to date; FinishDraws follows the draws.
  void PrepareDraws(const Batch& batch);
  void FinishDraws(const Batch& batch, const Drawn& drawn);

  // Whether the batch is a chunk of prompts even where it has one token a row, as the last of a
  // prompt may be: steps round otherwise than chunks on some devices, and which of them reads a
  // token must not depend on the others in the batch, if texts shall not.
  bool ReadsPrompts(const Batch& batch) const;

  void Launch(const std::function<void()>& pass, const Meanwhile& meanwhile) const;
  Drawn RunStep(const Batch& batch, const Meanwhile& meanwhile);
  void RunStepPass(const ActivePlan& plan, const Pass& pass);
  // Appends what the rows of a step have drawn, and what else they want of it.
  void TakeStep(const Batch& batch, Drawn& drawn) const;
  // The same of a step through a plan with sets.
  void TakeSets(const Batch& batch, const ActivePlan& plan, Drawn& drawn) const;
  Drawn RunChunk(const Batch& batch, const Meanwhile& meanwhile);
  Pass TakeChunk(const Batch& batch) const;
  void RunChunkPass(const Pass& pass, int64_t num_outputs);

  // Where steps are recorded, a pass that draws after each of its tokens is one of them: a check of
  // drafts, with room for as many tokens in every row.
  bool IsCheck(const Batch& batch) const;
  // For at least num_rows rows of at least num_tokens tokens each.
  Pass TakeCheck(int64_t num_rows, int64_t num_tokens) const;
  void RunCheckPass(const Pass& pass);

  void CheckRoom(const DecodeConfig& settings, const DecodePlan& plan) const;
  std::unique_ptr<ActivePlan> MakePlan(PlanId id, const DecodeConfig& settings);
  // The shadow that a plan asks for; null for one without.
  std::unique_ptr<ShadowCache> MakeShadow(PlanId id, const DecodePlan& plan,
                                          const PlanConfig& config);
  ShadowBalance MeasureBalance();
  // Brings the shadows of the rows' cached tokens up to date.
  void FillShadow(const ShadowCache& shadow, const std::vector<BatchRow>& rows);

  ModelConfig model_;
  DecodeConfig config_;
  DecodePlan plan_;
  std::unique_ptr<Backend> backend_;
  MemoryPlan memory_plan_;
  ModelWeights weights_;
  std::unique_ptr<RunnerBuffers> buffers_;
  std::unique_ptr<PagedKvCache> cache_;
  std::unique_ptr<HostPages> host_pages_;
  std::unique_ptr<Transformer> transformer_;
  ShadowBalance shadow_balance_;  // empty until a plan has a shadow
  std::map<PlanId, std::unique_ptr<ActivePlan>> plans_;
  PlanId next_plan_ = PlanId{2};
};

}  // namespace tidal
