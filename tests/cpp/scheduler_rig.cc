#include "scheduler_rig.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>

namespace tidal::test {
namespace {

uint64_t Mix(uint64_t bits) {
  bits = (bits ^ (bits >> 31)) * 0x9e3779b97f4a7c15ULL;
  return bits ^ (bits >> 29);
}

uint64_t Append(uint64_t hash, int32_t token) {
  return Mix(hash + 0x51ed270b0a1f39c1ULL * (static_cast<uint64_t>(token) + 1));
}

uint64_t FirstHash(float rotary) {
  return Mix(static_cast<uint64_t>(rotary * 1024));
}

}  // namespace

FakeModel::FakeModel(PagePool& pool, const FakeSpeed& speed, int32_t vocab_size)
    : pool_(pool),
      speed_(speed),
      vocab_size_(vocab_size),
      entries_(static_cast<size_t>(pool.num_pages() * pool.page_size())) {}

CacheEntry& FakeModel::At(const Sequence& sequence, int64_t position) {
  const int64_t page_size = pool_.page_size();
  const int32_t page = sequence.pages.pages().at(static_cast<size_t>(position / page_size));
  return entries_[static_cast<size_t>(page * page_size + position % page_size)];
}

// What the sequence says is cached is that, and clean as far as it says.
void FakeModel::CheckCached(const Sequence& sequence) {
  uint64_t hash = FirstHash(sequence.inv_freq[0]);
  for (int64_t i = 0; i < sequence.cached; ++i) {
    hash = Append(hash, sequence.tokens[static_cast<size_t>(i)]);
    ASSERT_EQ(At(sequence, i).hash, hash) << "token " << i << " of sequence " << sequence.id;
    if (i < sequence.clean_len) {
      ASSERT_TRUE(At(sequence, i).is_clean) << "token " << i << " of sequence " << sequence.id;
    }
  }
}

// Whoever read tainted tokens draws something else, and sparse steps now and then do.
int32_t FakeModel::Draw(const CacheEntry& entry, bool is_sparse, int32_t vocab_size) {
  uint64_t hash = entry.hash;
  if (!entry.is_clean || (is_sparse && hash % 4 == 0)) hash = Mix(hash);
  return static_cast<int32_t>(Mix(hash) % static_cast<uint64_t>(vocab_size));
}

Drawn FakeModel::Run(const Batch& batch) {
  CheckBatch(batch);
  Save(batch.saves);
  Restore(batch.restores);
  Copy(batch.copies);
  Drawn drawn;
  ChunkWork work;
  for (const BatchRow& row : batch.rows) {
    Sequence& sequence = *row.sequence;
    CheckCached(sequence);
    const int64_t begin = sequence.cached, end = begin + row.num_tokens;
    const bool is_sparse = batch.plan != PlanId::kDense && end > dense_len[batch.plan];
    uint64_t hash = begin == 0 ? FirstHash(sequence.inv_freq[0]) : At(sequence, begin - 1).hash;
    bool is_clean = begin == 0 || At(sequence, begin - 1).is_clean;
    bool is_poisoned = false;
    std::vector<int32_t> draws;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t token = sequence.tokens[static_cast<size_t>(i)];
      is_poisoned = is_poisoned || token == kPoison;
      hash = Append(hash, token);
      const int32_t page = sequence.pages.pages().at(static_cast<size_t>(i / pool_.page_size()));
      EXPECT_FALSE(pool_.IsShared(page)) << "wrote to a page that others read";
      // A sparse step draws from what it read, and leaves K and V that are slightly wrong.
      const int32_t draw = Draw({hash, is_clean}, is_sparse, vocab_size_);
      if (i >= end - row.num_draws) draws.push_back(draw);
      const int64_t logits = i - (end - row.num_logits);
      if (logits >= 0) row.logits[logits] = static_cast<float>(draw);
      is_clean = is_clean && !is_sparse;
      At(sequence, i) = {hash, is_clean};
    }
    if (is_poisoned) std::fill(draws.begin(), draws.end(), -1);
    drawn.tokens.push_back(draws);
    work.Add(row.num_tokens, begin);
    // The sequence is moved on, as a runner does.
    sequence.cached = end;
    if (is_sparse) {
      ++sequence.num_sparse;
      sequence.clean_len = std::min(sequence.clean_len, begin);
    } else if (sequence.clean_len >= begin) {
      sequence.clean_len = end;
    }
  }
  last_ms_ = batch.is_step()
                 ? speed_.step
                 : speed_.base + speed_.per_token * static_cast<double>(work.num_tokens) +
                       speed_.per_pair * work.num_pairs;
  return drawn;
}

void FakeModel::Save(const std::vector<PageCopy>& copies) {
  const int64_t page_size = pool_.page_size();
  for (const PageCopy& copy : copies) {
    const auto page = entries_.begin() + copy.from * page_size;
    host_[copy.to] = {page, page + page_size};
  }
}

void FakeModel::Restore(const std::vector<PageCopy>& copies) {
  for (const PageCopy& copy : copies) {
    const std::vector<CacheEntry>& page = host_.at(copy.from);
    std::copy(page.begin(), page.end(), entries_.begin() + copy.to * pool_.page_size());
  }
}

void FakeModel::Copy(const std::vector<PageCopy>& copies) {
  const int64_t page_size = pool_.page_size();
  for (const PageCopy& copy : copies) {
    std::copy_n(entries_.begin() + copy.from * page_size, page_size,
                entries_.begin() + copy.to * page_size);
  }
}

Tokens FakeModel::Continue(Tokens tokens, int64_t count, float rotary, int32_t vocab_size) {
  uint64_t hash = FirstHash(rotary);
  for (int32_t token : tokens) hash = Append(hash, token);
  Tokens generated;
  for (int64_t i = 0; i < count; ++i) {
    generated.push_back(Draw({hash, true}, false, vocab_size));
    hash = Append(hash, generated.back());
  }
  return generated;
}

RigOptions Small(int64_t num_pages, int64_t output_reserve) {
  RigOptions options;
  options.num_pages = num_pages;
  options.limits.output_reserve = output_reserve;
  return options;
}

Rig::Rig(const RigOptions& options)
    : pool(options.num_pages, options.page_size),
      prefixes(pool),
      scheduler(pool, options.caches_prefixes ? &prefixes : nullptr, options.limits),
      model(pool, options.speed, options.vocab_size),
      limits(options.limits) {}

Sequence Rig::MakeSequence(Tokens tokens, float rotary) {
  const auto length = static_cast<int64_t>(tokens.size());
  return {.id = next_sequence_++,
          .tokens = std::move(tokens),
          .dense_len = length,
          .pages = SequencePages(pool, 0),
          .inv_freq = {rotary},
          .sampling = {}};
}

RequestId Rig::Submit(Tokens prompt, Request request) {
  if (request.decoding.plan != PlanId::kDense) {
    model.dense_len[request.decoding.plan] = request.decoding.dense_len;
  }
  return scheduler.Add(std::move(request), MakeSequence(std::move(prompt)), now_ms);
}

RequestId Rig::Submit(Tokens prompt, int64_t max_new_tokens) {
  Request request;
  request.sampling.max_new_tokens = max_new_tokens;
  return Submit(std::move(prompt), request);
}

void Rig::CheckLimits(const Batch& batch) const {
  int64_t num_tokens = 0, num_draws = 0;
  for (const BatchRow& row : batch.rows) {
    num_tokens += row.num_tokens;
    num_draws += row.num_draws;
  }
  EXPECT_LE(static_cast<int64_t>(batch.rows.size()), limits.max_rows) << ToString(batch);
  if (batch.is_step()) return;  // a row of each request, whatever a pass may take
  if (num_draws == num_tokens) {
    EXPECT_LE(num_tokens, limits.max_check_tokens) << ToString(batch);
    return;
  }
  EXPECT_LE(num_tokens, limits.max_pass_tokens) << ToString(batch);
}

bool Rig::Step() {
  const Batch batch = scheduler.Next(now_ms);
  const bool has_rows = !batch.rows.empty();
  if (has_rows || !batch.saves.empty()) {
    passes.push_back(ToString(batch));
    CheckLimits(batch);
    const Drawn drawn = model.Run(batch);
    now_ms += model.last_ms();
    scheduler.Commit(batch, drawn, now_ms);
  }
  scheduler.CheckIntegrity();
  for (const RequestEvent& event : scheduler.TakeEvents()) events.push_back(event);
  return has_rows;
}

void Rig::StepUntilDone() {
  while (Step()) {
  }
  EXPECT_FALSE(scheduler.HasWork());
}

Tokens Rig::Generated(RequestId id) const {
  Tokens tokens;
  for (const RequestEvent& event : events) {
    if (event.id == id && event.token_id >= 0) tokens.push_back(event.token_id);
  }
  return tokens;
}

Tokens MakePrompt(int32_t first, int64_t count) {
  Tokens tokens;
  for (int64_t i = 0; i < count; ++i) {
    tokens.push_back(static_cast<int32_t>((first + i * (first + 1)) % kVocabSize));
  }
  return tokens;
}

Request TidalRequest(int64_t max_new_tokens, int64_t dense_len) {
  Request request;
  request.sampling.max_new_tokens = max_new_tokens;
  request.decoding = {.plan = kTidal, .dense_len = dense_len};
  return request;
}

Request ScoredRequest(Tokens forced, int64_t num_logits) {
  Request request;
  request.owner = SequenceOwner::kReplay;
  request.sampling.max_new_tokens = static_cast<int64_t>(forced.size());
  const auto count = static_cast<size_t>(num_logits);
  request.scoring = {.forced = std::move(forced),
                     .num_logits = num_logits,
                     .logits = std::make_shared<std::vector<float>>(count, -1.0f)};
  return request;
}

}  // namespace tidal::test
