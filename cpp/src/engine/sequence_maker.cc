#include "engine/sequence_maker.h"

#include <utility>

#include "model/rope.h"

namespace tidal {

Sequence SequenceMaker::Make(std::vector<int32_t> prompt, int64_t max_len,
                             const SamplingRow& sampling) {
  auto prompt_len = static_cast<int64_t>(prompt.size());
  return {.id = NextId(),
          .tokens = std::move(prompt),
          .dense_len = prompt_len,
          .pages = SequencePages(runner_.pool(), max_len),
          .inv_freq = ComputeRope(runner_.model(), prompt_len).inv_freq,
          .sampling = sampling};
}

Sequence SequenceMaker::MakeEmpty(int64_t max_len) {
  return {.id = NextId(),
          .tokens = {},
          .pages = SequencePages(runner_.pool(), 0),
          .inv_freq = ComputeRope(runner_.model(), max_len).inv_freq,
          .sampling = runner_.ScratchSampling()};
}

Sequence SequenceMaker::Fork(const Sequence& sequence) {
  return {.id = NextId(),
          .tokens = sequence.tokens,
          .dense_len = sequence.dense_len,
          .cached = sequence.cached,
          .num_sparse = sequence.num_sparse,
          .clean_len = sequence.clean_len,
          .shadow_plan = sequence.shadow_plan,
          .shadowed = sequence.shadowed,
          .pages = sequence.pages.Share(sequence.cached),
          .inv_freq = sequence.inv_freq,
          .sampling = sequence.sampling};
}

}  // namespace tidal
