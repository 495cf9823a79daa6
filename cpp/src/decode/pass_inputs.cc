#include "decode/pass_inputs.h"

#include <algorithm>

namespace tidal {

PassInputs::PassInputs(Backend& backend) : backend_(backend) {}

void PassInputs::Write(std::span<const PassRow> rows, const Pass& pass) {
  WriteTokens(rows, pass);
  for (size_t i = 0; i < rows.size(); ++i) {
    WriteOwner(static_cast<int64_t>(i), *rows[i].sequence, pass);
  }
}

void PassInputs::WriteTokens(std::span<const PassRow> rows, const Pass& pass) {
  const auto t = static_cast<size_t>(pass.token_ids.dim(0));
  const auto b = static_cast<size_t>(pass.seq_lens.dim(0));
  std::vector<int32_t> inputs(2 * t + b, 0);  // token_ids, positions, seq_lens
  std::vector<int32_t> seq_idx(t), q_starts(b + 1);
  size_t token = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto& [sequence, begin, count] = rows[i];
    q_starts[i] = static_cast<int32_t>(token);
    for (int64_t position = begin; position < begin + count; ++position, ++token) {
      inputs[token] = sequence->tokens[static_cast<size_t>(position)];
      inputs[t + token] = static_cast<int32_t>(position);
      seq_idx[token] = static_cast<int32_t>(i);
    }
    inputs[2 * t + i] = static_cast<int32_t>(begin + count);
  }
  std::fill(q_starts.begin() + static_cast<std::ptrdiff_t>(rows.size()), q_starts.end(),
            static_cast<int32_t>(token));
  // An idle token each for the idle rows, as long as there are some.
  for (size_t row = rows.size(); token < t; ++token, ++row) {
    inputs[t + token] = -1;
    seq_idx[token] = static_cast<int32_t>(std::min(row, b - 1));
  }
  backend_.Upload(pass.inputs, inputs.data());
  seq_idx_.Write(backend_, pass.seq_idx, seq_idx);
  q_starts_.Write(backend_, pass.q_starts, q_starts);
}

void PassInputs::WriteOwner(int64_t row, const Sequence& sequence, const Pass& pass) {
  const auto index = static_cast<size_t>(row);
  if (index >= owners_.size()) owners_.resize(index + 1);
  std::optional<Owner>& owner = owners_[index];
  const bool is_same_sequence = owner && owner->sequence_id == sequence.id;
  if (is_same_sequence && owner->pages_version == sequence.pages.version()) return;
  owner.reset();  // should an upload fail
  const std::vector<int32_t>& pages = sequence.pages.pages();
  const TensorView table = pass.page_table.Rows(row, 1);
  backend_.Upload(TensorView(table.ptr, DType::kInt32, {static_cast<int64_t>(pages.size())}),
                  pages.data());
  const TensorView& inv_freq = pass.rotation(RotationKind::kOfSequence).inv_freq;
  if (!is_same_sequence && inv_freq.rank > 0) {
    backend_.Upload(inv_freq.Rows(row, 1), sequence.inv_freq.data());
  }
  owner = {sequence.id, sequence.pages.version()};
}

}  // namespace tidal
