// What Decoder, Generation, Replay and Session share: the model, who decides what goes through it
// next, and the locks.
//
// Two locks, taken in this order. `device` belongs to whoever runs a pass, or does anything else
// that must not happen during one; `mutex` to whoever looks at requests, pages and rows, for a
// moment. The loop (engine_loop.cc) holds `device` from the choice of a pass until its results have
// been told. Requests may come and be cancelled during a pass, and sessions between their turns be
// changed: what is in the pass stays as it is until its end.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "core/fair_mutex.h"
#include "core/process.h"
#include "decode/model_runner.h"
#include "engine/plan_use.h"
#include "engine/scheduler.h"
#include "engine/sequence_maker.h"
#include "kv/prefix_cache.h"
#include "kv/sequence.h"
#include "tidal/decoder.h"

namespace tidal {

// How often whoever waits looks whether the process ends.
inline constexpr double kLookSeconds = 0.1;

// What a desk shares with its decoder.
struct GuideDesk::Impl {
  void Put(std::vector<GuideQuestion> questions);
  void Close();

  std::weak_ptr<Decoder::Impl> decoder;
  std::mutex mutex;  // of what follows; nothing else is locked while it is held
  std::condition_variable has_questions;
  std::vector<GuideQuestion> waiting;
  bool is_closed = false;
};

// Whoever calls its methods holds the decoder's mutex.
struct Inbox::Impl {
  // Lines a generation up that has news.
  void Put(Generation::Impl* generation);

  std::shared_ptr<Decoder::Impl> decoder;
  int event_fd;                              // -1: nobody listens any more
  std::vector<Generation::Impl*> waiting{};  // who has news, in line
};

// The last sets of the sequences of one call; outlives the Generation so that they can be looked
// at.
struct SelectionRecord {
  // Those of one sequence; no pass may run meanwhile.
  std::vector<LayerSelection> Read(const ModelRunner& runner, int64_t sequence) const;

  PlanId plan = PlanId::kDecoder;                       // that the call's steps go through
  std::vector<std::optional<uint64_t>> running;         // ids of sequences that still run
  std::vector<std::vector<LayerSelection>> selections;  // of those that ended
};

// Lives as long as the Decoder or anything it has started.
struct Decoder::Impl {
  Impl(const ModelConfig& model, const DecodeConfig& config, const WeightSource& weights,
       const LoadProgress& progress);
  ~Impl();

  using Lock = std::unique_lock<std::mutex>;

  // Both locks: nothing is in flight.
  struct Pause {
    std::unique_lock<FairMutex> device;
    Lock state;
  };
  // Who hears of a request.
  struct Listener {
    Generation::Impl* generation;
    int64_t index;  // of the sequence in it
  };

  // For a pass: lets others look at requests meanwhile. The caller holds both locks.
  class Unlocked {
   public:
    Unlocked(Impl& decoder, Lock& state) : decoder_(decoder), state_(state) {
      decoder_.is_in_pass = true;
      state_.unlock();
    }
    ~Unlocked() {
      state_.lock();
      decoder_.is_in_pass = false;
    }
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;

   private:
    Impl& decoder_;
    Lock& state_;
  };

  // These throw InvalidArgument once the decoder is closed, BackendError once the process ends,
  // UnsupportedError in a forked child. Enter() takes `mutex`, during a pass too.
  Lock Enter() const;
  Pause EnterBetweenPasses() const;
  // To look at what has ended or to give it back. Throw UnsupportedError in a forked child.
  Lock EnterToEnd() const;
  Pause PauseToEnd() const;

  // Throws as Enter does.
  void CheckOpen() const;
  // Throws CapacityError for prompts of a replay that do not fit now. The caller holds `mutex`.
  void CheckReplayFits(const std::vector<std::vector<int32_t>>& prompts, int64_t max_new_tokens);

  // How a plan makes tokens, with drafts that are checked or without.
  DecodePolicy PolicyOf(const ActivePlan& plan, bool verifies) const;

  // Starts the loop's thread with the first request. The caller holds `mutex`. Throws BackendError.
  void StartLoop();
  // Takes a request in, whose listener hears of it until it has ended. The caller holds `mutex`.
  // Throws as Scheduler::Add.
  RequestId Add(Request request, Sequence sequence, Listener listener);
  // The caller of a request has so many of its tokens; it has not ended. The caller holds `mutex`.
  void MarkHeard(RequestId id, int64_t num_tokens);
  // Ends a request, at once or with the pass that it is part of; no effect if it has ended. The
  // caller holds `mutex`.
  void Cancel(RequestId id, FinishReason reason);

  // engine_loop.cc: the thread that runs passes while there are requests.
  void Loop();
  bool RunPass();
  void EndAll();
  void Tell(std::span<const RequestId> in_flight, Drawn& drawn, const std::exception_ptr& error);
  // Wakes whoever waits for what has been told. The loop does so while the device works on the next
  // pass, or before it waits for anything else: with many readers it takes longer than the rest
  // between two passes. The caller holds `mutex`, or takes it by WakeToldNow.
  void WakeTold();
  void WakeToldNow();

  // guide_desk.cc: questions of guided requests, and answers, to which TakeAnswers() locks `mutex`.
  // The caller of the others holds it.
  void AskGuides();
  void TakeAnswers(std::vector<GuideAnswer> answers);
  void AwaitMasks(Lock& lock);
  double NowMs() const;

  ProcessMark process;
  ModelRunner runner;
  const ActivePlan& own_plan;  // the decoder's: others come and go
  SequenceMaker sequences;
  PrefixCache prefixes;
  Scheduler scheduler;
  std::map<RequestId, Listener> listeners;
  std::vector<Generation::Impl*> to_wake;  // who has been told news
  std::shared_ptr<GuideDesk::Impl> desk = std::make_shared<GuideDesk::Impl>();
  std::vector<std::unique_ptr<PlanUse>> left_plans;  // of calls that are gone
  std::shared_ptr<SelectionRecord> last_call;        // of the newest Generation
  std::atomic<bool> is_closed = false;               // set between passes
  bool is_ending = false;                            // the loop is to return
  bool is_woken = false;                             // something has come since the last pass
  bool is_in_pass = false;                           // whoever holds `device` has let go of `mutex`
  mutable FairMutex device;
  mutable std::mutex mutex;
  std::condition_variable has_work;  // or is_ending
  std::thread loop;                  // begins with the first request
};

// Who lends a call its sequences.
class SequenceLender {
 public:
  virtual ~SequenceLender() = default;

  // Sequence `index` of a call has ended, all that came before its new tokens having been read, or
  // not. The caller holds `mutex`.
  virtual void TakeBack(int64_t index, bool is_read, RequestState& left,
                        SequenceResult& result) = 0;
};

struct Replay::Impl : SequenceLender {
  Impl(std::shared_ptr<Decoder::Impl> decoder, const std::vector<std::vector<int32_t>>& prompts,
       int64_t max_new_tokens);
  ~Impl() override;

  using Logits = std::shared_ptr<std::vector<float>>;
  struct Prompt {
    std::optional<Sequence> sequence;  // empty while a run has it
    int64_t length;                    // tokens of the prompt
    int64_t num_shared;                // tokens in pages of an earlier prompt, which reads them
    std::optional<size_t> source;      // that prompt
    Logits logits;                     // [vocab_size], after the prompt, once it has been read
    bool is_read = false;
    int32_t first_token = -1;  // the most likely one

    // Lends the sequence, with `token` after the prompt if there is one.
    Sequence Lend(std::optional<int32_t> token);
  };

  // Gives the pages back; those of a run when it ends.
  void Close();
  // The pages that an earlier prompt has for what a sequence begins with, and which it is.
  struct Shared {
    std::vector<int32_t> pages{};
    std::optional<size_t> source{};
  };
  Shared MostShared(const Sequence& sequence) const;
  // Makes a run of all prompts, to which they are to be added once it has begun.
  static std::unique_ptr<Generation::Impl> NewRun(const std::shared_ptr<Impl>& self);
  // Throws InvalidArgument while another run has the prompts, and once the replay is closed; else
  // as Generation::Impl::SetOptions, and as it asks of its caller.
  void Begin(Generation::Impl& run, const CallOptions& options) const;
  void CheckRead() const;
  void TakeBack(int64_t index, bool is_read, RequestState& left, SequenceResult& result) override;

  std::shared_ptr<Decoder::Impl> decoder;
  int64_t max_new_tokens;
  std::vector<Prompt> prompts;
  bool is_closed = false;
};

struct Session::Impl : SequenceLender {
  Impl(std::shared_ptr<Decoder::Impl> decoder, Sequence sequence, int64_t max_seq_len);
  ~Impl() override;

  // Gives the pages back; those of a running turn when it ends.
  void Close();
  // Throws InvalidArgument while a turn runs, and once the session is closed.
  Sequence& Idle();
  // Throws CapacityError if its first `keep` tokens, num_added more and max_new_tokens after them
  // could never fit.
  void CheckFits(int64_t keep, int64_t num_added, int64_t max_new_tokens) const;
  // Begins a turn, as Session::Start; max_new_tokens 0 is one that only reads.
  std::unique_ptr<Generation> Begin(const std::shared_ptr<Impl>& self,
                                    const std::vector<int32_t>& token_ids,
                                    const SamplingParams& params, std::optional<int64_t> keep);
  // Makes the sequence its first `keep` tokens, then token_ids.
  void Extend(int64_t keep, std::span<const int32_t> token_ids);
  // Forgets the tokens from `length` on.
  void GoBack(Sequence& used, int64_t length) const;
  void TakeBack(int64_t index, bool is_read, RequestState& left, SequenceResult& result) override;
  // A turn has ended that gave out num_new tokens.
  void Return(Sequence used, bool is_read, int64_t num_new);

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

  // Sets what all sequences that are added after it have in common. The caller holds both locks if
  // there is a plan.
  void SetOptions(const CallOptions& options);
  // Adds one more sequence, which goes on from where its cache ends, for a request made from
  // `common`. The caller holds the decoder's mutex. Throws as Scheduler::Add.
  void Add(Sequence sequence, Request request);
  // Adds one that has nothing to do, and returns its result.
  SequenceResult& AddEnded(const Sequence& sequence, FinishReason reason);

  std::vector<TokenEvent> Advance(double timeout_s);
  void Stop(int64_t sequence, FinishReason reason);
  void Close();
  std::vector<SequenceResult> Results() const;
  std::vector<TokenLogprobs> Logprobs(int64_t sequence, int64_t first) const;
  std::vector<float> TakeLogits(int64_t sequence);
  RequestStatus Status(int64_t sequence) const;
  std::vector<LayerSelection> Selection(int64_t sequence) const;
  bool HasNews() const;  // the caller holds the decoder's mutex
  void NotifyAt(int fd);
  void ForgetFd(int fd);
  // Wakes whoever waits for news. The caller holds the decoder's mutex.
  void Wake();

  // What a pass gave that is not yet in the results.
  struct News {
    double time_ms = 0.0;
    int64_t prefill_done = 0;          // tokens, up to here
    std::vector<TokenEvent> tokens{};  // at most one of each sequence
    std::vector<int64_t> ended{};      // sequences of which there is no more
    std::exception_ptr error{};        // why a pass has failed
  };

  struct Running {
    RequestId id;
    int64_t num_cached;                  // tokens, when it was added
    int64_t num_read = 0;                // of the prompt, since
    std::optional<RequestState> left{};  // of its request, once that has ended
    double first_token_ms = 0.0;
    std::shared_ptr<std::vector<float>> logits{};  // that were asked for
  };

  // engine_loop.cc tells these, in this order: how far each sequence is, what has happened to it,
  // and that the pass is over. The caller holds the decoder's mutex.
  void HearProgress(int64_t index, const RequestState& request);
  void HearScored(int64_t index, std::vector<TokenLogprobs>& scored);
  void HearSets(int64_t index, const ChosenSets& sets);
  void Hear(int64_t index, const RequestEvent& event, TokenLogprobs* logprobs);
  void HearEnd(int64_t index, RequestState left, std::vector<LayerSelection> selection);
  void HearPassEnd(const std::exception_ptr& error);

  // inbox.cc: all news up to an end or a failure; and no longer being heard there.
  Letter TakeLetter();
  void Leave();

  void Expect(const Sequence& sequence);
  void CheckIndex(int64_t index) const;
  bool IsAlive(int64_t index) const;
  // Waits for the pass that the sequence, which was cancelled, may be part of.
  void AwaitEnd(int64_t index, Decoder::Impl::Lock& lock);
  std::vector<TokenEvent> Take(News news);
  void End(int64_t index, FinishReason reason, double time_ms);

  std::shared_ptr<Decoder::Impl> decoder;
  std::shared_ptr<SequenceLender> lender;  // null: the sequences are the call's own
  std::unique_ptr<PlanUse> plan_use;       // of a call with a plan of its own
  Request common;                          // what its requests are made from
  std::vector<Running> running;
  std::vector<SequenceResult> results;
  std::shared_ptr<SelectionRecord> record;
  std::deque<News> news;
  std::vector<News> heard;  // of the pass that is being told
  std::condition_variable has_news;
  std::vector<int> event_fds;          // to be written when there is news
  std::shared_ptr<Inbox::Impl> inbox;  // where it is heard; null: nowhere
  int64_t inbox_key = 0;
  bool is_in_line = false;  // there
  double start_ms;
  // What is read without a lock.
  // The decoder's to_wake names it, or just did; no longer set once all have ended.
  std::atomic<bool> is_to_be_woken = false;
  std::atomic<int64_t> num_alive{0};  // sequences whose end has not been given out
  std::atomic<int64_t> prefill_done{0};
  int64_t prefill_total = 0;  // does not change once the generation has started
};

}  // namespace tidal
