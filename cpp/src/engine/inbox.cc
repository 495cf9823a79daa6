// Many generations heard at one place: who has news waits in line, and all of it is taken at once.
#include <unistd.h>

#include <utility>

#include "engine/decoder_impl.h"
#include "tidal/error.h"

namespace tidal {

void Inbox::Impl::Put(Generation::Impl* generation) {
  if (generation->is_in_line) return;
  generation->is_in_line = true;
  waiting.push_back(generation);
  const uint64_t one = 1;
  // Who comes to the first finds the others. A counter that is full wakes as well.
  if (waiting.size() > 1 || event_fd < 0 || write(event_fd, &one, sizeof(one)) < 0) return;
}

Inbox::Inbox(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

Inbox::~Inbox() {
  if (!impl_->decoder->process.IsForeign()) Close();
}

void Inbox::Add(Generation& generation, int64_t key) {
  auto lock = impl_->decoder->EnterToEnd();
  Generation::Impl& added = *generation.impl_;
  TIDAL_CHECK(added.decoder == impl_->decoder && added.running.size() == 1, InvalidArgument,
              "generation: expected one sequence, of the inbox's decoder");
  added.Leave();
  added.inbox = impl_;
  added.inbox_key = key;
  if (added.HasNews()) impl_->Put(&added);
}

void Inbox::Remove(Generation& generation) {
  auto lock = impl_->decoder->EnterToEnd();
  if (generation.impl_->inbox == impl_) generation.impl_->Leave();
}

std::vector<Letter> Inbox::Take() {
  auto lock = impl_->decoder->EnterToEnd();
  std::vector<Letter> letters;
  letters.reserve(impl_->waiting.size());
  for (Generation::Impl* generation : std::exchange(impl_->waiting, {})) {
    generation->is_in_line = false;
    letters.push_back(generation->TakeLetter());
  }
  return letters;
}

void Inbox::Close() {
  auto lock = impl_->decoder->EnterToEnd();
  impl_->event_fd = -1;
}

void Generation::Impl::Leave() {
  if (is_in_line) std::erase(inbox->waiting, this);
  is_in_line = false;
  inbox = nullptr;
}

// The caller holds the decoder's mutex.
Letter Generation::Impl::TakeLetter() {
  Letter letter{.key = inbox_key};
  while (!news.empty() && news.front().ended.empty() && !news.front().error) {
    News next = std::move(news.front());
    news.pop_front();
    for (const TokenEvent& event : Take(std::move(next))) {
      letter.token_ids.push_back(event.token_id);
    }
  }
  letter.has_more = HasNews();
  return letter;
}

}  // namespace tidal
