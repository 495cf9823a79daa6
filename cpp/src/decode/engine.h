// Engine: a model on a device with everything a pass needs. Turns sequences into passes; knows
// nothing of calls, stop rules or threads (decoder.cc, generation.cc).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "decode/decode_step.h"
#include "decode/engine_buffers.h"
#include "decode/transformer.h"
#include "kv/paged_kv_cache.h"
#include "kv/sequence.h"
#include "kv/shadow_cache.h"
#include "model/weights.h"
#include "tidal/decoder.h"
#include "tidal/plan.h"

namespace tidal {

// A plan and its sets, for steps that run another one than the decoder's.
struct OtherPlan {
  DecodePlan plan;
  Selection selection;
  std::unique_ptr<ShadowCache> shadow;
  int64_t correction_interval = 0;
  // Of all sparse steps so far.
  int64_t num_sets = 0;
  int64_t num_positions = 0;
};

class Engine {
 public:
  Engine(const ModelConfig& model, const DecodeConfig& config, const WeightSource& weights,
         const Decoder::LoadProgress& progress);

  const ModelConfig& model() const { return model_; }
  const DecodeConfig& config() const { return config_; }
  const DecodePlan& plan() const { return plan_; }
  PagePool& pool() { return cache_->pool(); }
  const MemoryPlan& memory_plan() const { return memory_plan_; }
  // All that was allocated on the device so far, by purpose.
  const std::vector<MemoryItem>& allocated() const { return backend_->allocated(); }

  // Makes a sequence with pages for max_len tokens, rotated as its prompt's length asks. Throws
  // CapacityError.
  Sequence MakeSequence(std::vector<int32_t> prompt, int64_t max_len, const SamplingRow& sampling);

  // Makes one without tokens and pages that may grow to max_len tokens (OwnPages), rotated as that
  // length asks.
  Sequence MakeEmptySequence(int64_t max_len);

  // Another sequence of the same tokens. The pages of those that are cached belong to both.
  Sequence Fork(const Sequence& sequence);

  // Before tokens from position `first` on are cached: pages for num_tokens tokens, of which no
  // other sequence owns those that are written. Throws CapacityError, changing nothing.
  void OwnPages(Sequence& sequence, int64_t num_tokens, int64_t first);

  // Puts random K and V into pages of the sequences that never had any, for measuring.
  void FillCache(const std::vector<Sequence>& sequences, uint64_t seed);

  // Greedy parameters for rows whose draw nobody keeps.
  SamplingRow ScratchSampling() const;

  // Marks the sequence's first num_tokens tokens, and no others, in its sampling slot, if its
  // parameters ask for it. Draws mark what they draw.
  void MarkSeen(const Sequence& sequence, int64_t num_tokens);

  // Caches the next chunk of the prompt. Returns the number of tokens done.
  int64_t PrefillNext(Sequence& sequence);

  // Caches the tokens from `cached` on, densely, up to `end` or a chunk of them; returns how many.
  int64_t CacheDensely(Sequence& sequence, int64_t end);

  // Before a step: if correction_interval tokens of the sequence have been decoded sparsely since
  // the last time, rewrites their K and V densely, as a prompt's, chunk by chunk.
  void CorrectCache(Sequence& sequence) { CorrectCache(sequence, config_.correction_interval); }

  // After the last chunk, of chunk_len tokens: the first generated token (not appended to the
  // sequence); -1 if the logits were unusable.
  int32_t SampleAfterPrefill(const Sequence& sequence, int64_t chunk_len);

  // Logits after the tokens [first, last) of the chunk that PrefillNext just did, as indices into
  // the sequence; appended to `out`.
  void AppendPrefillLogits(const Sequence& sequence, int64_t chunk_len, int64_t first, int64_t last,
                           std::vector<float>& out);

  // One decode step: caches each row's last token and returns its successors (-1: unusable logits).
  // At most max_batch_size rows, each with exactly one token not yet cached.
  std::vector<int32_t> Step(std::span<Sequence* const> rows, StepPlan plan = StepPlan::kDecoder);

  // Whether this decoder checks what sparse steps draft. A dense one has nothing to draft with.
  bool verifies() const { return buffers_->verifier.has_value(); }

  // Whether the next step of the sequence reads chosen positions only.
  bool IsSparse(const Sequence& sequence) const;

  // Caches all tokens of each row that are not yet cached, densely, and returns for each row the
  // successors drawn after them (-1: unusable logits). Rows, and tokens of a row, as in a Verifier.
  std::vector<std::vector<int32_t>> Verify(std::span<Sequence* const> rows);

  // As Step, through another plan, with its own cache correction before it; where steps are
  // recorded, it must not be called.
  std::vector<int32_t> StepThrough(OtherPlan& other, std::span<Sequence* const> rows);

  // The plan of these settings, with memory of its own.
  std::unique_ptr<OtherPlan> MakePlan(const PlanConfig& asked);

  // Logits of a row of the last Step, before sampling (greedy rows without penalty only).
  void AppendStepLogits(int64_t row, std::vector<float>& out);

  // What the choosing layers chose for the sequence in the last sparse step, if it took part.
  std::vector<LayerSelection> ReadSelection(uint64_t sequence_id) const;

 private:
  void Warm();
  std::vector<int32_t> RunStep(std::span<Sequence* const> rows, const StepAttention& how,
                               bool sparse);
  // The attention of the decoder's own plan.
  StepAttention OwnAttention() const { return {plan_, buffers_->selection, shadow_.get()}; }
  // The shadow that a plan asks for; null for one without.
  std::unique_ptr<ShadowCache> MakeShadow(PlanId id, const DecodePlan& plan,
                                          const PlanConfig& config);
  ShadowBalance MeasureBalance();
  // Brings the shadows of the rows' cached tokens up to date.
  void FillShadow(const ShadowCache& shadow, std::span<Sequence* const> rows);
  void CorrectCache(Sequence& sequence, int64_t interval);
  // Counts a sparse step of these rows.
  static void CountSparse(std::span<Sequence* const> rows, const Selection& selection);
  void RunPass(const StepKey& key, const StepAttention& how, const Pass& pass);
  void UploadRows(std::span<Sequence* const> rows, const Pass& pass);
  void UploadTokens(std::span<Sequence* const> rows, const Pass& pass);

  ModelConfig model_;
  DecodeConfig config_;
  DecodePlan plan_;
  DecodePlan dense_plan_;
  std::unique_ptr<Backend> backend_;
  MemoryPlan memory_plan_;
  ModelWeights weights_;
  std::unique_ptr<EngineBuffers> buffers_;
  std::unique_ptr<PagedKvCache> cache_;
  std::unique_ptr<ShadowCache> shadow_;  // null: the plan has none
  std::unique_ptr<Transformer> transformer_;

  ShadowBalance shadow_balance_;  // empty until a plan has a shadow
  uint64_t next_sequence_id_ = 1;
  PlanId next_plan_ = PlanId{2};
  std::vector<uint64_t> step_rows_;  // ids whose page tables and parameters are in buffers_->step
  struct SparseRow {
    uint64_t id;
    int64_t seq_len;
  };
  std::vector<SparseRow> last_sparse_rows_;
};

}  // namespace tidal
