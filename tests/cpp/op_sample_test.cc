// Sample: from logits to tokens. Single draws against the reference, and their distribution.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>

#include "backend_test.h"

namespace tidal::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Greedy, and everything off.
SamplingRow Greedy(int32_t slot) {
  return {.temperature = 0.0f,
          .top_p = 1.0f,
          .min_p = 0.0f,
          .repetition_penalty = 1.0f,
          .frequency_penalty = 0.0f,
          .presence_penalty = 0.0f,
          .top_k = 0,
          .slot = slot,
          .num_biases = 0,
          .has_mask = 0,
          .keeps_logits = 0,
          .seed = 0};
}

SamplingRow Draw(int32_t slot, uint64_t seed) {
  SamplingRow row = Greedy(slot);
  row.temperature = 1.0f;
  row.seed = seed;
  return row;
}

struct Batch {
  int64_t vocab_size = 0;
  Values logits;  // [B, V]
  std::vector<SamplingRow> rows;
  Ints seq_lens;
  Ints history;                                  // [num_slots, V]
  std::vector<std::vector<TokenBias>> biases{};  // by slot, up to kMaxBiases each
  std::vector<Ints> banned{};                    // by row
};

struct Outcome {
  Ints token_ids;
  Ints history;
  Values logits;
};

constexpr int64_t kMaxBiases = 40;

class OpSample : public BackendTest {
 protected:
  void OpenOn(const BackendCase& on, int64_t vocab_size) {
    StepLimits limits = SmallLimits(on.dtype);
    limits.model.vocab_size = vocab_size;
    limits.max_batch_size = 64;
    Open(on, limits);
  }

  Outcome Run(const Batch& batch) {
    const int64_t rows = static_cast<int64_t>(batch.rows.size()), vocab = batch.vocab_size;
    const int64_t slots = static_cast<int64_t>(batch.history.size()) / vocab;
    Bytes row_bytes(batch.rows.size() * sizeof(SamplingRow));
    std::memcpy(row_bytes.data(), batch.rows.data(), row_bytes.size());
    const Shape rows_shape = {rows, static_cast<int64_t>(sizeof(SamplingRow))};
    const SampleArgs args = {
        .logits = Put(batch.logits, DType::kFloat32, {rows, vocab}),
        .rows = PutBytes(row_bytes, DType::kUInt8, rows_shape),
        .seq_lens = PutInts(batch.seq_lens, {rows}),
        .history = PutInts(batch.history, {slots, vocab}),
        .biases = PutBytes(Biases(batch, slots), DType::kUInt8,
                           {slots, kMaxBiases * static_cast<int64_t>(sizeof(TokenBias))}),
        .masks = PutInts(Masks(batch), {rows, NumMaskWords(vocab)}),
        .copies = Output(DType::kFloat32, {rows, vocab}),
        .token_ids = Output(DType::kInt32, {rows})};
    backend().Sample(args);
    return {GetInts(args.token_ids), GetInts(args.history), Get(args.logits)};
  }

  // Every bit past those of the vocabulary is set, as if more tokens were allowed.
  static Ints Masks(const Batch& batch) {
    const int64_t num_words = NumMaskWords(batch.vocab_size);
    Ints masks(batch.rows.size() * static_cast<size_t>(num_words), -1);
    for (size_t b = 0; b < batch.banned.size(); ++b) {
      for (int32_t id : batch.banned[b]) {
        int32_t& word = masks[b * static_cast<size_t>(num_words) + static_cast<size_t>(id / 32)];
        word = static_cast<int32_t>(static_cast<uint32_t>(word) & ~(1u << (id % 32)));
      }
    }
    return masks;
  }

  static Bytes Biases(const Batch& batch, int64_t num_slots) {
    Bytes bytes(static_cast<size_t>(num_slots * kMaxBiases) * sizeof(TokenBias), 0xff);
    for (size_t slot = 0; slot < batch.biases.size(); ++slot) {
      const std::vector<TokenBias>& own = batch.biases[slot];
      std::memcpy(bytes.data() + slot * kMaxBiases * sizeof(TokenBias), own.data(),
                  own.size() * sizeof(TokenBias));
    }
    return bytes;
  }

  // `copies` rows of the same logits, at positions first_position, + 1, ...
  static Batch Repeat(const Values& logits, SamplingRow row, int64_t copies,
                      int32_t first_position) {
    Batch batch;
    batch.vocab_size = static_cast<int64_t>(logits.size());
    for (int64_t i = 0; i < copies; ++i) {
      batch.logits.insert(batch.logits.end(), logits.begin(), logits.end());
      row.slot = static_cast<int32_t>(i);
      batch.rows.push_back(row);
      batch.seq_lens.push_back(first_position + static_cast<int32_t>(i));
    }
    batch.history.assign(batch.logits.size(), 0);
    return batch;
  }

  // Counts of `draws` tokens drawn from the same logits, each at a position of its own.
  std::map<int32_t, int64_t> Count(const Values& logits, const SamplingRow& row, int64_t draws) {
    std::map<int32_t, int64_t> counts;
    for (int64_t done = 0; done < draws; done += 64) {
      const Batch batch = Repeat(logits, row, 64, static_cast<int32_t>(1 + done));
      for (int32_t id : Run(batch).token_ids) ++counts[id];
    }
    return counts;
  }

  static reference::SampleProblem RowProblem(const Batch& batch, size_t b) {
    const SamplingRow& row = batch.rows[b];
    const auto logits = batch.logits.begin() + b * batch.vocab_size;
    const auto history = batch.history.begin() + row.slot * batch.vocab_size;
    Values biases(static_cast<size_t>(batch.vocab_size), 0.0);
    for (int32_t i = 0; i < row.num_biases; ++i) {
      const TokenBias& bias = batch.biases[static_cast<size_t>(row.slot)][static_cast<size_t>(i)];
      biases[static_cast<size_t>(bias.token_id)] = bias.bias;
    }
    return {.logits = std::vector<float>(logits, logits + batch.vocab_size),
            .history = Ints(history, history + batch.vocab_size),
            .biases = biases,
            .banned = row.has_mask != 0 ? batch.banned[b] : Ints{},
            .temperature = row.temperature,
            .top_k = row.top_k,
            .top_p = row.top_p,
            .min_p = row.min_p,
            .repetition_penalty = row.repetition_penalty,
            .frequency_penalty = row.frequency_penalty,
            .presence_penalty = row.presence_penalty,
            .seed = row.seed,
            .position = static_cast<uint32_t>(batch.seq_lens[b])};
  }
};

TEST_P(OpSample, GreedyTakesTheLowestIdOfTheHighestLogit) {
  for (int64_t vocab : {5, 1000, 32001}) {
    SCOPED_TRACE(vocab);
    OpenOn(GetParam(), vocab);
    Values logits = Random(1).Normal(4 * vocab, DType::kFloat32);
    const int64_t late = vocab - 1, early = vocab / 2;
    logits[late] = 9.0;                                     // row 0: the last id
    logits[vocab + late] = logits[vocab + early] = 9.0;     // row 1: a tie
    std::fill_n(logits.begin() + 2 * vocab, vocab, -3.0);   // row 2: all equal
    std::fill_n(logits.begin() + 3 * vocab, vocab, -kInf);  // row 3: one is not -inf
    logits[3 * vocab + 2] = -1e30;
    const Batch batch = {vocab,
                         logits,
                         {Greedy(0), Greedy(1), Greedy(2), Greedy(3)},
                         {9, 1, 5, 70},
                         Ints(4 * vocab, 0)};
    const Outcome outcome = Run(batch);
    EXPECT_EQ(outcome.token_ids,
              (Ints{static_cast<int32_t>(late), static_cast<int32_t>(early), 0, 2}));
    EXPECT_EQ(outcome.history, Ints(4 * vocab, 0)) << "nobody looks at it";
  }
}

TEST_P(OpSample, UnusableRowsGiveMinusOneAndNeighboursAreUnchanged) {
  constexpr int64_t kVocab = 1000;
  OpenOn(GetParam(), kVocab);
  SamplingRow settings = Draw(0, 5);
  settings.presence_penalty = 0.5f;
  Batch batch = Repeat(Random(2).Normal(kVocab, DType::kFloat32), settings, 8, 40);
  const Outcome clean = Run(batch);
  for (double temperature : {0.0, 1.0}) {
    SCOPED_TRACE(temperature);
    Batch bad = batch;
    for (int64_t row : {1, 3, 5, 6}) bad.rows[row].temperature = static_cast<float>(temperature);
    bad.logits[1 * kVocab + 999] = kNan;
    bad.logits[3 * kVocab + 0] = kInf;
    std::fill_n(bad.logits.begin() + 5 * kVocab, kVocab, -kInf);
    std::fill_n(bad.logits.begin() + 6 * kVocab, kVocab, kNan);
    const Outcome outcome = Run(bad);
    Ints want = clean.token_ids;
    Ints want_history = clean.history;
    for (int64_t row : {1, 3, 5, 6}) {
      want[row] = -1;
      want_history[row * kVocab + clean.token_ids[row]] = 0;  // an unusable row marks nothing
    }
    EXPECT_EQ(outcome.token_ids, want);
    EXPECT_EQ(outcome.history, want_history);
  }
}

TEST_P(OpSample, IdleRowGivesZeroAndMarksNothing) {
  constexpr int64_t kVocab = 64;
  OpenOn(GetParam(), kVocab);
  SamplingRow settings = Greedy(0);
  settings.frequency_penalty = 0.5f;
  Batch batch = Repeat(Random(3).Normal(kVocab, DType::kFloat32), settings, 3, 5);
  batch.seq_lens[1] = 0;
  std::fill_n(batch.logits.begin() + kVocab, kVocab, kNan);  // whatever it holds
  const Outcome outcome = Run(batch);
  EXPECT_EQ(outcome.token_ids[1], 0);
  EXPECT_EQ(outcome.token_ids[0], outcome.token_ids[2]);
  const Ints slot(outcome.history.begin() + kVocab, outcome.history.begin() + 2 * kVocab);
  EXPECT_EQ(slot, Ints(kVocab, 0));
  EXPECT_EQ(outcome.history[outcome.token_ids[0]], kGeneratedMark);
}

TEST_P(OpSample, RepetitionPenaltyLowersSeenTokensOfEitherSign) {
  OpenOn(GetParam(), 4);
  // Positive logits are divided, negative ones multiplied; slot 0's sequence has seen nothing.
  Batch batch = {4, {}, {Greedy(0), Greedy(1), Greedy(2)}, {3, 3, 3}, Ints(12, 0)};
  for (SamplingRow& row : batch.rows) row.repetition_penalty = 2.0f;
  batch.logits = {4.0,  3.0,  -1.0, -9.0,   // unseen: stays 0
                  4.0,  3.0,  -1.0, -9.0,   // 4 / 2 < 3
                  -1.0, -1.5, -4.0, -4.0};  // -1 x 2 < -1.5
  batch.history[1 * 4 + 0] = kGivenMark;    // of the prompt or not: both count
  batch.history[2 * 4 + 0] = kGeneratedMark;
  EXPECT_EQ(Run(batch).token_ids, (Ints{0, 1, 1}));
}

TEST_P(OpSample, PresenceAndFrequencyCountGeneratedTokensOnly) {
  OpenOn(GetParam(), 4);
  Batch batch = {4, {}, {}, {3, 3, 3, 3}, Ints(16, 0)};
  for (int32_t row = 0; row < 4; ++row) {
    batch.rows.push_back(Greedy(row));
    for (double logit : {4.0, 3.0, 2.0, -1.0}) batch.logits.push_back(logit);
    batch.history[row * 4 + 0] = kGivenMark;
    batch.history[row * 4 + 1] = 3 * kGeneratedMark + kGivenMark;
  }
  batch.rows[0].presence_penalty = batch.rows[0].frequency_penalty = 2.0f;  // 4: of the prompt
  batch.rows[1].frequency_penalty = -0.5f;                                  // 3 + 3 * 0.5
  batch.rows[2].presence_penalty = -1.5f;                                   // 3 + 1.5
  batch.rows[3].presence_penalty = -0.5f;
  const Outcome outcome = Run(batch);
  EXPECT_EQ(outcome.token_ids, (Ints{0, 1, 1, 0}));
  for (int32_t row = 0; row < 4; ++row) {
    const int32_t drawn = outcome.token_ids[row];
    EXPECT_EQ(outcome.history[row * 4 + drawn], batch.history[row * 4 + drawn] + kGeneratedMark);
  }
}

TEST_P(OpSample, MaskedTokensAreNotDrawn) {
  constexpr int64_t kVocab = 1001;
  OpenOn(GetParam(), kVocab);
  const Values logits = Random(21).Normal(kVocab, DType::kFloat32);
  for (double temperature : {0.0, 1.0}) {
    Batch batch = Repeat(logits, Draw(0, 6), 4, 30);
    for (SamplingRow& row : batch.rows) row.temperature = static_cast<float>(temperature);
    const Ints free = Run(batch).token_ids;
    Ints all_but_last, all;
    for (int32_t id = 0; id < kVocab; ++id) all.push_back(id);
    all_but_last.assign(all.begin(), all.end() - 1);
    batch.banned = {{free[0]}, all_but_last, all, {free[3]}};
    for (size_t row : {0, 1, 2}) batch.rows[row].has_mask = 1;  // not the last
    const Ints got = Run(batch).token_ids;
    EXPECT_NE(got[0], free[0]);
    EXPECT_EQ(got[1], kVocab - 1);
    EXPECT_EQ(got[2], -1);
    EXPECT_EQ(got[3], free[3]);
  }
}

// So many tokens that a device spreads them over blocks.
TEST_P(OpSample, RowsThatKeepTheirLogitsDrawTheSame) {
  constexpr int64_t kVocab = 20011, kRows = 8;
  OpenOn(GetParam(), kVocab);
  Batch batch = Repeat(Random(22).Normal(kVocab, DType::kFloat32), Draw(0, 9), kRows, 7);
  const Ints marks = Random(23).Below(kRows * kVocab, 6);
  for (size_t i = 0; i < marks.size(); ++i) batch.history[i] = std::max(marks[i] - 2, 0);
  for (int64_t b = 0; b < kRows; ++b) {
    SamplingRow& row = batch.rows[b];
    row.temperature = b & 1 ? 0.8f : 0.0f;
    row.frequency_penalty = b & 2 ? 0.3f : 0.0f;
    row.num_biases = b & 4 ? 2 : 0;
    batch.biases.push_back({{static_cast<int32_t>(kVocab - 1), 3.5f}, {17, 3.6f}});
  }
  const Ints want = Run(batch).token_ids;
  for (SamplingRow& row : batch.rows) row.keeps_logits = 1;
  const Outcome outcome = Run(batch);
  EXPECT_EQ(outcome.token_ids, want);
  EXPECT_EQ(outcome.logits, batch.logits);
}

TEST_P(OpSample, DrawsEqualTheReference) {
  constexpr int64_t kVocab = 1000, kRows = 64;
  OpenOn(GetParam(), kVocab);
  Random random(4);
  Batch batch = Repeat(Values(kVocab, 0.0), Draw(0, 0), kRows, 1000);
  batch.logits = random.Normal(kRows * kVocab, DType::kFloat32, 3.0);
  const Ints marks = random.Below(kRows * kVocab, 8);
  for (size_t i = 0; i < marks.size(); ++i) batch.history[i] = std::max(marks[i] - 3, 0);
  batch.banned.resize(kRows);
  for (int64_t b = 0; b < kRows; ++b) {  // every mixture of settings
    SamplingRow& row = batch.rows[b];
    row.seed = 0x123456789abcdefull * static_cast<uint64_t>(b + 1);
    row.temperature = b % 3 == 0 ? 0.7f : 1.3f;
    row.top_k = b & 1 ? 40 : 0;
    row.top_p = b & 2 ? 0.9f : 1.0f;
    row.min_p = b & 4 ? 0.02f : 0.0f;
    row.repetition_penalty = b & 8 ? 1.3f : 1.0f;
    row.frequency_penalty = b & 16 ? 0.4f : 0.0f;
    row.presence_penalty = b & 32 ? -0.7f : 0.0f;
    row.has_mask = b % 5 == 0;
    batch.banned[b] = random.Subset(kVocab / 3, kVocab);
    row.num_biases = b % 7 == 0 ? kMaxBiases : 0;
    batch.biases.emplace_back();
    for (int32_t id : random.Subset(kMaxBiases, kVocab)) {
      batch.biases.back().push_back({id, static_cast<float>(id % 9) - 4.0f});
    }
  }
  const Ints got = Run(batch).token_ids;
  int64_t compared = 0;
  for (int64_t b = 0; b < kRows; ++b) {
    const reference::Draw want = reference::Sample(RowProblem(batch, static_cast<size_t>(b)));
    if (want.margin < 1e-4) continue;  // rounding may decide
    EXPECT_EQ(got[b], want.token_id) << "row " << b;
    ++compared;
  }
  EXPECT_GT(compared, kRows - 4);
}

TEST_P(OpSample, SameSeedSamePositionSameToken) {
  constexpr int64_t kVocab = 128;
  OpenOn(GetParam(), kVocab);
  const Values logits = Random(5).Normal(kVocab, DType::kFloat32);
  Batch batch = Repeat(logits, Draw(0, 77), 64, 10);
  const Ints first = Run(batch).token_ids;
  EXPECT_EQ(Run(batch).token_ids, first);
  // A row's draw does not depend on where in the batch it is.
  std::reverse(batch.seq_lens.begin(), batch.seq_lens.end());
  Ints reversed = Run(batch).token_ids;
  std::reverse(reversed.begin(), reversed.end());
  EXPECT_EQ(reversed, first);
  for (SamplingRow& row : batch.rows) row.seed = 78;
  EXPECT_NE(Run(batch).token_ids, first);
}

TEST_P(OpSample, TopKKeepsExactlyK) {
  constexpr int64_t kVocab = 300;
  OpenOn(GetParam(), kVocab);
  const Ints rank = Random(6).Permutation(kVocab);
  Values logits;  // nearly flat, so that a few thousand draws meet every token that is left
  for (int32_t r : rank) logits.push_back(-0.001 * r);
  for (int32_t top_k : {1, 2, 17, 300, 1000}) {
    SCOPED_TRACE(top_k);
    SamplingRow row = Draw(0, 9);
    row.top_k = top_k;
    const auto counts = Count(logits, row, 64 * 64);
    EXPECT_EQ(static_cast<int64_t>(counts.size()), std::min<int64_t>(top_k, kVocab));
    for (const auto& [id, count] : counts) EXPECT_LT(rank[id], top_k);
  }
}

TEST_P(OpSample, TopPAndMinPKeepTheReferencesTokens) {
  constexpr int64_t kVocab = 50;
  OpenOn(GetParam(), kVocab);
  const Values logits = Random(7).Normal(kVocab, DType::kFloat32, 1.0);
  struct Filter {
    float top_p, min_p;
    int32_t top_k;
  };
  for (const Filter& filter :
       {Filter{0.5f, 0.0f, 0}, Filter{0.8f, 0.0f, 20}, Filter{1.0f, 0.3f, 0},
        Filter{0.7f, 0.35f, 30}, Filter{1e-6f, 0.0f, 0}, Filter{1.0f, 1.0f, 0}}) {
    SCOPED_TRACE(::testing::Message() << "top_p " << filter.top_p << ", min_p " << filter.min_p
                                      << ", top_k " << filter.top_k);
    SamplingRow row = Draw(0, 21);
    row.top_p = filter.top_p;
    row.min_p = filter.min_p;
    row.top_k = filter.top_k;
    const Values kept = reference::FilterLogits(RowProblem(Repeat(logits, row, 1, 1), 0));
    Ints want, got;
    for (int32_t id = 0; id < kVocab; ++id) {
      if (kept[id] > -kInf) want.push_back(id);
    }
    for (const auto& [id, count] : Count(logits, row, 64 * 64)) got.push_back(id);
    EXPECT_EQ(got, want);
  }
}

// So many tokens that a device spreads them over blocks, and filters that cut through equals.
TEST_P(OpSample, FiltersKeepTheLowestOfEqualsInALargeVocabulary) {
  constexpr int64_t kVocab = 20011;
  OpenOn(GetParam(), kVocab);
  Values logits;
  for (int64_t id = 0; id < kVocab; ++id) logits.push_back(id % 7 == 3 ? 2.0 : 1.0);
  struct Filter {
    int32_t top_k;
    float top_p;
  };
  for (const Filter& filter :
       {Filter{1, 1.0f}, Filter{700, 1.0f}, Filter{2859, 1.0f}, Filter{9001, 1.0f},
        Filter{0, 0.11f}, Filter{0, 0.47f}, Filter{1500, 0.31f}, Filter{9001, 0.83f}}) {
    SCOPED_TRACE(::testing::Message() << "top_k " << filter.top_k << ", top_p " << filter.top_p);
    int64_t compared = 0;
    for (uint64_t seed = 1; seed <= 8; ++seed) {
      SamplingRow row = Draw(0, seed);
      row.top_k = filter.top_k;
      row.top_p = filter.top_p;
      const Batch batch = Repeat(logits, row, 3, 1);
      const Ints got = Run(batch).token_ids;
      for (size_t b = 0; b < 3; ++b) {
        const reference::Draw want = reference::Sample(RowProblem(batch, b));
        if (want.margin < 1e-4) continue;  // rounding may decide
        EXPECT_EQ(got[b], want.token_id) << "seed " << seed << ", row " << b;
        ++compared;
      }
    }
    EXPECT_GT(compared, 20);
  }
}

TEST_P(OpSample, GreedyLeavesTheLogitsOfARowWithoutPenalty) {
  constexpr int64_t kVocab = 5003;
  OpenOn(GetParam(), kVocab);
  const Values logits = Random(14).Normal(2 * kVocab, DType::kFloat32);
  Batch batch = {kVocab, logits, {Greedy(0), Draw(1, 3)}, {4, 4}, Ints(2 * kVocab, 0)};
  batch.rows[1].temperature = 0.5f;
  const Values after = Run(batch).logits;
  EXPECT_TRUE(std::equal(logits.begin(), logits.begin() + kVocab, after.begin()));
}

// Pearson's chi-squared of 20000 draws against softmax(logits / temperature).
TEST_P(OpSample, StatisticsOfDrawsFollowTheSoftmax) {
  OpenOn(GetParam(), 8);
  const Values logits = {1.0, 0.2, -0.5, 2.0, 0.0, -2.0, 1.5, -kInf};
  constexpr int64_t kDraws = 64 * 313;
  for (float temperature : {0.6f, 1.0f, 2.0f}) {
    SCOPED_TRACE(temperature);
    SamplingRow row = Draw(0, 2024);
    row.temperature = temperature;
    auto counts = Count(logits, row, kDraws);
    double total = 0.0, chi_squared = 0.0;
    for (double logit : logits) total += std::exp(logit / temperature);
    for (size_t id = 0; id < logits.size(); ++id) {
      const double expected = kDraws * std::exp(logits[id] / temperature) / total;
      const double observed = static_cast<double>(counts[static_cast<int32_t>(id)]);
      if (expected == 0.0) {
        EXPECT_EQ(observed, 0.0);
      } else {
        chi_squared += (observed - expected) * (observed - expected) / expected;
      }
    }
    EXPECT_LT(chi_squared, 27.9) << "the 99.99 % point of chi-squared with 6 degrees of freedom";
  }
}

// The noise is a function of seed, position and id: the device draws what the CPU draws.
TEST_P(OpSample, DrawsEqualTheCpus) {
  if (GetParam().is_cpu()) GTEST_SKIP() << "compares another device with the CPU";
  constexpr int64_t kVocab = 32001, kRows = 64;
  Batch batch = Repeat(Random(11).Normal(kVocab, DType::kFloat32, 2.0), Draw(0, 3), kRows, 100);
  for (int64_t b = 0; b < kRows; ++b) {
    batch.rows[b].top_k = b & 1 ? 50 : 0;
    batch.rows[b].presence_penalty = b & 2 ? 0.5f : 0.0f;
  }
  OpenOn(GetParam(), kVocab);
  const Outcome device = Run(batch);
  OpenOn({DeviceType::kCpu, DType::kFloat32}, kVocab);
  const Outcome cpu = Run(batch);
  EXPECT_EQ(device.token_ids, cpu.token_ids);
  EXPECT_EQ(device.history, cpu.history);
}

INSTANTIATE_TEST_SUITE_P(Backends, OpSample, ::testing::ValuesIn(EachDevice()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
