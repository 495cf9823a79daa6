// What Decoder, Generation, Replay and Session share: the engine, its lock, and what is left of
// ended sequences.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "decode/engine.h"
#include "decode/sequence.h"
#include "tidal/decoder.h"

namespace tidal {

// The sampling slots (rows of `seen`) of a decoder; one sequence owns one.
class SlotPool {
 public:
  explicit SlotPool(int64_t num_slots);
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int32_t Take();
  void Release(int32_t slot) { free_.push_back(slot); }

 private:
  std::vector<int32_t> free_;
};

// The last sets of the sequences of one call; outlives the Generation so that they can be looked
// at.
struct SelectionRecord {
  std::vector<std::optional<uint64_t>> running;         // engine ids of sequences that still run
  std::vector<std::vector<LayerSelection>> selections;  // of those that ended
};

struct Decoder::Impl {
  Impl(const ModelConfig& model, const DecodeConfig& config, const WeightSource& weights,
       const LoadProgress& progress)
      : engine(model, config, weights, progress), slots(engine.config().max_batch_size) {}

  Engine engine;
  SlotPool slots;
  std::shared_ptr<SelectionRecord> last_call;  // of the newest Generation
  mutable std::mutex mutex;                    // one thread at a time in the engine
};

struct Replay::Impl {
  Impl(Decoder::Impl& decoder, const std::vector<std::vector<int32_t>>& prompts,
       int64_t max_new_tokens);
  ~Impl();

  struct Prompt {
    Sequence sequence;
    std::vector<float> logits;  // [vocab_size], after the prompt; empty until it has been read
    int32_t first_token = -1;   // the most likely one
  };

  bool ReadNext();
  void ReadAll();
  // Back to where the prompts end, and which sequences those are.
  std::vector<Sequence*> Rewind();

  Decoder::Impl& decoder;
  int64_t max_new_tokens;
  std::vector<Prompt> prompts;
  double mean_set_size = 0.0;
};

struct Session::Impl {
  Impl(Decoder::Impl& decoder, Sequence sequence, int64_t max_seq_len);
  ~Impl();

  // Throws InvalidArgument while a turn runs.
  Sequence& Idle();
  // The sequence's first `keep` tokens, then token_ids, with pages for max_new_tokens more. Throws
  // CapacityError, changing nothing.
  void Extend(int64_t keep, std::span<const int32_t> token_ids, int64_t max_new_tokens);
  // Forgets the tokens from `length` on.
  void GoBack(Sequence& used, int64_t length) const;
  // A turn has ended that generated num_new tokens. The caller holds the lock.
  void TakeBack(Sequence used, int64_t num_new);

  Decoder::Impl& decoder;
  int64_t max_seq_len;
  std::optional<Sequence> sequence;  // empty while a turn runs
  int64_t turn_len = 0;              // tokens the running turn generates after
  // What it goes back to if it does not get to read them.
  int64_t kept = 0;
  int64_t kept_prompt_len = 0;
};

struct Generation::Impl {
  explicit Impl(Decoder::Impl& decoder);
  ~Impl();

  // Takes a batch row for one more sequence, which goes on from where its cache ends.
  void Add(Sequence sequence, const SamplingParams& params);

  std::vector<TokenEvent> Advance();
  void Stop(int64_t sequence, FinishReason reason);

  struct Running {
    std::optional<Sequence> sequence;  // empty once ended
    SamplingParams params;
    int64_t draft_tokens = 0;  // to try next, if the decoder verifies
    double first_token_s = 0.0;
    std::deque<int32_t> drawn{};  // tokens of the sequence that are not yet in its result
  };

  void Accept(int64_t index, int32_t token, std::vector<TokenEvent>& events);
  void End(int64_t index, FinishReason reason);
  void PrefillOne(int64_t index, std::vector<TokenEvent>& events);
  void StepAll();
  void VerifyAll(const std::vector<size_t>& indices);
  double Elapsed() const;

  Decoder::Impl& decoder;
  std::shared_ptr<Session::Impl> session;  // whose turn this is; null: prompts of a call
  std::vector<Running> running;
  std::vector<SequenceResult> results;
  std::shared_ptr<SelectionRecord> record;
  PrefillProgress prefill;
  int64_t num_alive = 0;
  int64_t start_ns = 0;
};

}  // namespace tidal
