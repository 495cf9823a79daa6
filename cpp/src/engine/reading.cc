#include "engine/reading.h"

#include <algorithm>

namespace tidal {

BatchRow NextChunk(const ModelRunner& runner, Sequence& sequence, int64_t end) {
  return {.sequence = &sequence,
          .num_tokens = std::min(runner.config().prefill_chunk, end - sequence.cached),
          .num_draws = 0};
}

int64_t NumCommonPages(std::span<const int32_t> earlier, std::span<const int32_t> tokens,
                       int64_t page_size) {
  const auto end =
      std::mismatch(earlier.begin(), earlier.end(), tokens.begin(), tokens.end() - 1).second;
  return (end - tokens.begin()) / page_size;
}

void CorrectCache(ModelRunner& runner, Sequence& sequence, int64_t interval) {
  if (interval == 0 || sequence.num_sparse < interval) return;
  const int64_t end = sequence.cached;
  sequence.Rewind(end - sequence.num_sparse);
  while (sequence.cached < end) runner.Run({.rows = {NextChunk(runner, sequence, end)}});
}

}  // namespace tidal
