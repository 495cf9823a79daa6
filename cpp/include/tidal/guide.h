// Guided decoding: somebody outside of the engine, who knows a grammar, says before each draw of a
// request which tokens it may give. A request is guided whose SamplingParams name a guide.
//
// The engine asks as soon as it knows the tokens that a draw will follow, and goes on with other
// requests until the answer is there. With drafts it asks after each draft too, and takes back
// those that turn out wrong.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace tidal {

// What the next token of a request may be, behind these tokens that it has generated.
struct GuideQuestion {
  uint64_t request = 0;
  int64_t guide = 0;   // SamplingParams::guide
  int64_t number = 0;  // of the request's questions
  // The generated tokens: the first `keep` of those that the last question was about, then these.
  int64_t keep = 0;
  std::vector<int32_t> tokens{};
  bool is_over = false;  // the request has ended: there is nothing to answer
};

struct GuideAnswer {
  uint64_t request = 0;  // these two as in the question
  int64_t number = 0;
  // [NumMaskWords(vocab_size)], token id i is bit i % 32 of word i / 32; or empty with an error.
  std::vector<uint32_t> allowed{};
  // The text is whole: the tokens that are allowed, which may be none, can only end it.
  bool is_complete = false;
  std::string error{};  // why the request cannot go on; empty if it can
};

// Where the questions of a decoder are fetched and answered. May be used from several threads, and
// outlives the decoder.
class GuideDesk {
 public:
  struct Impl;
  explicit GuideDesk(std::shared_ptr<Impl> impl);

  // Waits, at most so long, until there are questions, and returns all of them, in order. Returns
  // none once the desk is closed.
  std::vector<GuideQuestion> Wait(double timeout_s = std::numeric_limits<double>::infinity());

  // Answers questions; an answer that comes too late has no effect. Throws InvalidArgument for a
  // mask of the wrong size.
  void Answer(std::vector<GuideAnswer> answers);

  // Wakes who waits, for good. The decoder does so when it ends.
  void Close();
  bool is_closed() const;

 private:
  std::shared_ptr<Impl> impl_;
};

}  // namespace tidal
