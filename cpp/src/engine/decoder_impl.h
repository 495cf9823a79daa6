// What Decoder, Generation, Replay and Session share: the model, its lock, and what is left of
// ended sequences.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "core/fair_mutex.h"
#include "core/process.h"
#include "decode/model_runner.h"
#include "engine/sequence_maker.h"
#include "kv/sequence.h"
#include "tidal/decoder.h"

namespace tidal {

// The sampling slots (decode/sampling_slots.h) of a decoder; one sequence owns one.
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

// Lives as long as the Decoder or anything it has started.
struct Decoder::Impl {
  Impl(const ModelConfig& model, const DecodeConfig& config, const WeightSource& weights,
       const LoadProgress& progress)
      : runner(model, config, weights, progress),
        sequences(runner),
        slots(runner.config().max_batch_size) {}

  using Lock = std::unique_lock<FairMutex>;

  // Waits until no other thread is in the engine. Throws InvalidArgument once the decoder is
  // closed, BackendError once the process ends, UnsupportedError in a forked child.
  Lock Enter() const;

  // Waits as Enter does, to look at what has ended or to give it back. Throws UnsupportedError in a
  // forked child.
  Lock EnterToEnd() const;

  ProcessMark process;
  ModelRunner runner;
  SequenceMaker sequences;
  SlotPool slots;
  std::shared_ptr<SelectionRecord> last_call;  // of the newest Generation
  bool is_closed = false;
  mutable FairMutex mutex;  // of all of the above; one thread at a time in the engine
};

struct Replay::Impl {
  Impl(std::shared_ptr<Decoder::Impl> decoder, const std::vector<std::vector<int32_t>>& prompts,
       int64_t max_new_tokens);
  ~Impl();

  struct Prompt {
    Sequence sequence;
    std::vector<float> logits;  // [vocab_size], after the prompt; empty until it has been read
    int32_t first_token = -1;   // the most likely one
  };

  // Enters the engine. Throws InvalidArgument once the replay is closed.
  Decoder::Impl::Lock Enter() const;
  // Gives the pages back.
  void Close();

  bool ReadNext();
  void ReadAll();
  // Back to where the prompts end, and which sequences those are.
  std::vector<Sequence*> Rewind();

  std::shared_ptr<Decoder::Impl> decoder;
  int64_t max_new_tokens;
  std::vector<Prompt> prompts;
  bool is_closed = false;
  double mean_set_size = 0.0;
};

struct Session::Impl {
  Impl(std::shared_ptr<Decoder::Impl> decoder, Sequence sequence, int64_t max_seq_len);
  ~Impl();

  // Gives the pages back; those of a running turn when it ends.
  void Close();
  // Throws InvalidArgument while a turn runs, and once the session is closed.
  Sequence& Idle();
  // The sequence's first `keep` tokens, then token_ids, with pages for max_new_tokens more. Throws
  // CapacityError, changing nothing.
  void Extend(int64_t keep, std::span<const int32_t> token_ids, int64_t max_new_tokens);
  // Forgets the tokens from `length` on.
  void GoBack(Sequence& used, int64_t length) const;
  // A turn has ended that generated num_new tokens. The caller holds the lock.
  void TakeBack(Sequence used, int64_t num_new);

  std::shared_ptr<Decoder::Impl> decoder;
  int64_t max_seq_len;
  bool is_closed = false;
  std::optional<Sequence> sequence;  // empty while a turn runs
  int64_t turn_len = 0;              // tokens the running turn generates after
  // What it goes back to if it does not get to read them.
  int64_t kept = 0;
  int64_t kept_dense_len = 0;
};

struct Generation::Impl {
  explicit Impl(std::shared_ptr<Decoder::Impl> decoder);
  ~Impl();

  // Takes a batch row for one more sequence, which goes on from where its cache ends. Throws before
  // it takes the sequence, or as what then ends as all others do.
  void Add(Sequence&& sequence, const SamplingParams& params);

  std::vector<TokenEvent> Advance();
  void Stop(int64_t sequence, FinishReason reason);
  void Close();

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

  std::shared_ptr<Decoder::Impl> decoder;
  std::shared_ptr<Session::Impl> session;  // whose turn this is; null: prompts of a call
  std::vector<Running> running;
  std::vector<SequenceResult> results;
  std::shared_ptr<SelectionRecord> record;
  // What is read without waiting for the engine.
  std::atomic<int64_t> num_alive{0};
  std::atomic<int64_t> prefill_done{0};
  int64_t prefill_total = 0;  // does not change once the generation has started
  int64_t start_ns = 0;
};

}  // namespace tidal
