// The front door: a model in memory, ready to continue token sequences. Knows ids, never text.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "tidal/config.h"
#include "tidal/device.h"
#include "tidal/guide.h"
#include "tidal/memory_plan.h"
#include "tidal/plan.h"
#include "tidal/request.h"
#include "tidal/weights.h"

namespace tidal {

class Decoder;

// One running call. A thread of the decoder advances all calls together, whether anybody waits for
// them or not; this hands out what came of one.
//
// This class, Replay and Session may be used from several threads and hold what they need of their
// Decoder: they throw InvalidArgument once the object or its Decoder is closed. In a child made by
// fork() they throw UnsupportedError; closing or destroying them there does nothing.
class Generation {
 public:
  ~Generation();
  Generation(const Generation&) = delete;
  Generation& operator=(const Generation&) = delete;

  // Waits, at most so many seconds, for a pass that a sequence of this call had part in, and
  // returns at most one new token of each: none of a chunk that does not end a prompt, or once the
  // time is over. More tokens of a round of drafts are returned by the calls after it. Returns
  // nothing once done(). Throws what the pass has failed with, and CapacityError if sessions hold
  // the pages that a sequence needs.
  std::vector<TokenEvent> Advance(double timeout_s = std::numeric_limits<double>::infinity());

  // Where a sequence is, which may be ahead of what has been handed out.
  RequestStatus Status(int64_t sequence) const;

  // What each choosing layer chose for a sequence in its last sparse step; empty if it has had
  // none, or if others have stepped since. While the sequence runs, this waits for the pass under
  // way and holds up the next one: nothing to ask for after every token.
  std::vector<LayerSelection> Selection(int64_t sequence) const;

  // Whether Advance() would return at once.
  bool has_news() const;

  // From now on adds 1 to this eventfd whenever there is news for Advance(), or its end; at once if
  // there is already. ForgetFd ends that, before the fd is closed.
  void NotifyAt(int fd);
  void ForgetFd(int fd);

  // Whether all ends have been handed out. Neither of these waits.
  bool done() const;
  PrefillProgress prefill_progress() const;

  // Ends a sequence (a stop string was found, the user cancelled) where its results are. Waits for
  // the pass under way if the sequence is part of it. No effect if it has ended.
  void Stop(int64_t sequence, FinishReason reason);

  // Ends all sequences that still run (kAbort), as destruction does. Their results stay.
  void Close();

  std::vector<SequenceResult> results() const;
  // Those of a sequence's tokens from index `first` on that have been handed out; none unless they
  // were asked for.
  std::vector<TokenLogprobs> Logprobs(int64_t sequence, int64_t first) const;

  // Those that Decoder::Score or Replay::StepLogits was asked for, [rows, vocab_size] float32;
  // once. Throws InvalidArgument if they are not all there.
  std::vector<float> TakeLogits(int64_t sequence);

 private:
  friend class Decoder;
  friend class Inbox;
  friend class Replay;
  friend class Session;
  struct Impl;
  explicit Generation(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// What has come of a generation of one sequence since the last time.
struct Letter {
  int64_t key = 0;  // that the generation was added with
  std::vector<int32_t> token_ids{};
  bool has_more = false;  // Advance() has its end, or what it has failed with
};

// Where many generations are heard at once, each of one sequence: who waits for them all need not
// look at each.
class Inbox {
 public:
  ~Inbox();
  Inbox(const Inbox&) = delete;
  Inbox& operator=(const Inbox&) = delete;

  // From now on the news of a generation comes here, under a key of the caller's; what there is
  // already, too. Throws InvalidArgument unless it has one sequence, of this decoder.
  void Add(Generation& generation, int64_t key);
  // No longer; what has come meanwhile is left to Advance(), or until it is added again.
  void Remove(Generation& generation);

  // The news of all that have some, as Advance() would give it, without waiting for any.
  std::vector<Letter> Take();

  // Leaves the eventfd alone from now on.
  void Close();

 private:
  friend class Decoder;
  friend class Generation;
  struct Impl;
  explicit Inbox(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;  // the generations that are heard have it too
};

// Prompts that are read once and continued again and again from there, each time with a plan of its
// own: what comparing plans needs. Owns pages, but no batch rows, until it is closed or destroyed.
// The K and V of a prompt are dense, never rewritten, whatever the plan's correction_interval.
//
// What it starts are calls of all its prompts, one at a time: until a Generation is done or
// destroyed, the next one throws InvalidArgument. They tell how far they have read, and their ends,
// but not token by token.
class Replay {
 public:
  ~Replay();
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  // Reads what has not been read of the prompts, densely: before anything else. Throws as Score.
  std::unique_ptr<Generation> Read();

  // Teacher forcing: decodes the continuations, one per prompt, a step at a time through the plan.
  // Row i of a prompt's logits follows the prompt and i tokens: [continuation.size() + 1,
  // vocab_size]. Throws InvalidArgument, CapacityError, and OutOfMemoryError for a plan without
  // room.
  std::unique_ptr<Generation> StepLogits(const PlanConfig& plan,
                                         const std::vector<std::vector<int32_t>>& continuations);

  // The most likely tokens through the plan, as Decoder::Start with these settings decodes them: up
  // to max_new_tokens a prompt, a stop token being the last. None are those of a prompt whose
  // logits were unusable. Throws as StepLogits.
  std::unique_ptr<Generation> Greedy(const PlanConfig& plan, int64_t max_new_tokens,
                                     const std::vector<int32_t>& stop_token_ids);

  // Gives the pages back, those of a running call when that ends.
  void Close();

 private:
  friend class Decoder;
  struct Impl;
  explicit Replay(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;  // a running call keeps it too
};

// A conversation: its tokens stay in the cache from one turn to the next. Owns pages for them, and
// from when a turn is let in for max_new_tokens more. One turn at a time: until its Generation is
// done or destroyed, what reads or changes the tokens throws InvalidArgument.
//
// What Append and Start are given is read densely, however often the session has decoded before.
// What was generated stays as it was decoded, a stop token at the end included; the last token,
// which no step has cached yet, is cached with the next. With a correction_interval, what was
// decoded sparsely and not yet corrected is read again with what is appended to it.
class Session {
 public:
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // A turn that generates nothing: adds tokens and reads all but the last, which is left to the
  // next turn. Throws as Start does.
  std::unique_ptr<Generation> Append(const std::vector<int32_t>& token_ids);

  // A turn: keeps the first `keep` tokens (none given: all), adds token_ids, which may be empty,
  // and generates after them; without token_ids it goes on as if the last turn had not ended.
  // Waits in line for a row, and for pages for all that it can need. Throws InvalidArgument, and
  // CapacityError for what could never fit, the session being as before. A turn that ends before
  // its tokens have been read takes them back, as when it lacks pages that nobody gives back; any
  // other leaves them and what was generated.
  std::unique_ptr<Generation> Start(const std::vector<int32_t>& token_ids,
                                    const SamplingParams& params,
                                    std::optional<int64_t> keep = std::nullopt);

  // Forgets the tokens from `length` on.
  void Truncate(int64_t length);

  // A session of its own with the same tokens. Takes no pages: those in the cache are shared until
  // one of the owners writes to them, which copies the page.
  std::unique_ptr<Session> Fork() const;

  // Gives the pages back, those of a running turn when that ends.
  void Close();

  std::vector<int32_t> token_ids() const;
  int64_t num_cached() const;  // of its tokens

  // Returns how many tokens it can have at this time if the first `keep` stay and others are added
  // (or not, and decoding goes on): what its own pages, the free ones and max_seq_len allow.
  int64_t MostTokens(int64_t keep, bool adds) const;
  int64_t max_seq_len() const;

 private:
  friend class Decoder;
  friend class Generation;
  struct Impl;
  explicit Session(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;  // a running turn keeps it too
};

// What Decoder::MeasureSteps measures.
struct StepBenchmark {
  std::vector<int64_t> seq_lens;  // one a batch row: tokens in the cache, the newest included, >= 1
  int64_t steps = 30;             // timed ones, >= 1
  int64_t warmup = 5;             // untimed, before them; a device may record its graph in two
  PlanId plan = PlanId::kDecoder;
};

class Decoder {
 public:
  using LoadProgress = tidal::LoadProgress;

  // Plans its memory, loads the weights onto the device and allocates everything a step needs:
  // nothing is allocated on the device afterwards, but for plans of a Replay or of a call. Throws
  // ConfigError, WeightsError, InvalidArgument, UnsupportedError, OutOfMemoryError, BackendError.
  Decoder(const ModelConfig& model, const DecodeConfig& config, const WeightSource& weights,
          const LoadProgress& progress = nullptr);
  ~Decoder();
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  // Ends the decoder: what it has started throws InvalidArgument at the next step. Waits for the
  // step under way. The memory comes back when the Decoder and all that it started are destroyed.
  void Close();

  // Starts a call; its sequences wait in line for rows and pages. params has one entry per prompt.
  // Throws InvalidArgument for a bad prompt or parameter, CapacityError for what could never fit,
  // OutOfMemoryError for a plan without room.
  std::unique_ptr<Generation> Start(const std::vector<std::vector<int32_t>>& prompts,
                                    const std::vector<SamplingParams>& params,
                                    const CallOptions& options = {});

  // Teacher forcing: a call that reads the first num_prefill tokens densely and decodes the others
  // one step at a time through the plan, for the logits after the last num_logits of them
  // (Generation::TakeLogits). What is read is read by itself, whatever else runs; steps are shared.
  // It tells its end only, and is let in with pages for all its tokens. Throws InvalidArgument, and
  // CapacityError for what could never fit.
  std::unique_ptr<Generation> Score(const std::vector<int32_t>& token_ids, int64_t num_prefill,
                                    int64_t num_logits);

  // Reserves pages for the prompts and `max_new_tokens` after each; nothing has run yet. Throws
  // InvalidArgument and CapacityError.
  std::unique_ptr<Replay> StartReplay(const std::vector<std::vector<int32_t>>& prompts,
                                      int64_t max_new_tokens);

  // An empty session that may grow to max_seq_len tokens (0: the decoder's). The length decides for
  // rotary frequencies that depend on it; pages are taken as tokens come. Throws InvalidArgument
  // and CapacityError.
  std::unique_ptr<Session> StartSession(int64_t max_seq_len = 0);

  // For measuring speed: seconds of each timed step, by the host's clock, from token ids going up
  // to their successors coming down, as every step of a Generation runs. The cache needs no
  // prefill: pages that a measurement uses first are filled with random K and V. Every step is the
  // same one, at the same lengths, greedy. Afterwards all pages are free again and running
  // sequences go on undisturbed. Throws InvalidArgument, CapacityError if it does not fit,
  // WeightsError if the logits are not finite.
  std::vector<double> MeasureSteps(const StepBenchmark& benchmark);

  // What each choosing layer chose for `sequence` (index into the prompts of the last call; 0 for a
  // session's turn) in the last sparse step of that call; empty if it has had none, or if it still
  // runs and others have stepped since.
  std::vector<LayerSelection> Selection(int64_t sequence) const;

  DecoderStats stats() const;

  // One whose eventfd gets 1 added when there is news for Take() and there was none before.
  std::unique_ptr<Inbox> OpenInbox(int event_fd);

  // Where guided requests ask.
  std::shared_ptr<GuideDesk> guide_desk() const;

  const ModelConfig& model() const;
  const DecodeConfig& config() const;  // with automatic values filled in
  const DecodePlan& plan() const;
  const MemoryPlan& memory_plan() const;
  int64_t num_free_pages() const;  // that no sequence holds
  int64_t num_free_rows() const;   // batch rows that no running sequence owns

 private:
  friend class Generation;
  friend class GuideDesk;
  friend class Inbox;
  friend class Replay;
  friend class Session;
  struct Impl;
  std::shared_ptr<Impl> impl_;  // what was started holds it too
};

// Before the process exits, so that no thread is in the engine when its libraries go: every call
// throws BackendError before its next step, and every later one at once. There is no way back.
void EndAllCalls();

}  // namespace tidal
