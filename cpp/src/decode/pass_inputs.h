// PassInputs: what the host writes for a pass: which tokens, and whose they are. What is on the
// device already does not go up again: a row costs no more than its token as long as the same
// sequence, with the same pages, stays in it.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "decode/mirror.h"
#include "decode/pass.h"
#include "kv/sequence.h"

namespace tidal {

// The tokens of one sequence in a pass: `count` of them, from `begin` on.
struct PassRow {
  const Sequence* sequence = nullptr;
  int64_t begin = 0;
  int64_t count = 0;
};

class PassInputs {
 public:
  // For passes that are taken of one PassBuffers.
  explicit PassInputs(Backend& backend);

  // Uploads the inputs of a pass whose rows are `rows`. Batch rows past them are idle, and so are
  // tokens past theirs.
  void Write(std::span<const PassRow> rows, const Pass& pass);

 private:
  // Whose page table and rotary frequencies are in a row.
  struct Owner {
    uint64_t sequence_id;
    uint64_t pages_version;
  };

  void WriteTokens(std::span<const PassRow> rows, const Pass& pass);
  void WriteOwner(int64_t row, const Sequence& sequence, const Pass& pass);

  Backend& backend_;
  std::vector<std::optional<Owner>> owners_;  // by row, to the last used; nothing: not known
  Mirror<int32_t> seq_idx_;
  Mirror<int32_t> q_starts_;
};

}  // namespace tidal
