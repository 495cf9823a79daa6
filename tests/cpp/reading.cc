#include "reading.h"

#include <algorithm>

namespace tidal::test {

BatchRow NextChunk(const ModelRunner& runner, Sequence& sequence, int64_t end) {
  return {.sequence = &sequence,
          .num_tokens = std::min(runner.config().prefill_chunk, end - sequence.cached),
          .num_draws = 0};
}

void CorrectCache(ModelRunner& runner, Sequence& sequence, int64_t interval) {
  if (interval == 0 || sequence.num_sparse < interval) return;
  const int64_t end = sequence.cached;
  sequence.Rewind(end - sequence.num_sparse);
  while (sequence.cached < end) runner.Run({.rows = {NextChunk(runner, sequence, end)}});
}

}  // namespace tidal::test
