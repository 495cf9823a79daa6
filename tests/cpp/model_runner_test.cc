// ModelRunner: batches as a scheduler makes them, whose rows join, leave and change places.
#include "decode/model_runner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "backend/memory_meter.h"
#include "engine/sequence_maker.h"
#include "reading.h"
#include "throws.h"
#include "tidal/error.h"
#include "tiny_model.h"

namespace tidal::test {
namespace {

int64_t NumTokens(const Sequence& sequence) {
  return static_cast<int64_t>(sequence.tokens.size());
}

class Runner : public DecoderTest {
 protected:
  void SetUp() override {
    DecoderTest::SetUp();
    if (IsSkipped()) return;
    prompts_ = MakePrompts({90, 3, 41, 1, 60});
  }

  std::unique_ptr<ModelRunner> MakeRunner(const DecodeConfig& config) const {
    return std::make_unique<ModelRunner>(model_, config, weights_, nullptr);
  }

  // Gives the batch's rows places for their logits.
  std::vector<std::vector<float>> PlacesFor(Batch& batch) const {
    std::vector<std::vector<float>> places;
    places.reserve(batch.rows.size());
    for (BatchRow& row : batch.rows) {
      places.emplace_back(static_cast<size_t>(row.num_logits * model_.vocab_size));
      row.logits = places.back().data();
    }
    return places;
  }

  // What a Generation of the prompt alone gives.
  Ints Alone(const DecodeConfig& config, const Ints& prompt, int64_t max_new_tokens) const {
    return Generate(*Make(config), {prompt}, Greedy(max_new_tokens))[0].token_ids;
  }

  Prompts prompts_;
};

// Caches the sequence's prompt and appends the token drawn after it.
void Read(ModelRunner& runner, Sequence& sequence) {
  while (!sequence.prefilled()) {
    BatchRow row = NextChunk(runner, sequence, sequence.dense_len);
    row.num_draws = sequence.cached + row.num_tokens == sequence.dense_len ? 1 : 0;
    const Drawn drawn = runner.Run({.rows = {row}});
    if (row.num_draws > 0) sequence.tokens.push_back(drawn.tokens[0][0]);
  }
}

// Each decodes 20 tokens behind its prompt, in whatever rows and beside whomever.
TEST_P(Runner, ARowThatJoinsEqualsTheRowAlone) {
  if (!is_cpu()) GTEST_SKIP() << "on CUDA rows agree to rounding only";
  constexpr int64_t kNew = 20;
  for (DecodeConfig config : {Dense(), Tidal()}) {
    const auto runner = MakeRunner(config);
    SequenceMaker maker(*runner);
    std::mt19937 random(7);
    std::vector<Sequence> sequences;
    sequences.reserve(prompts_.size());
    std::vector<BatchRow> rows;
    size_t next = 0;
    while (next < prompts_.size() || !rows.empty()) {
      if (next < prompts_.size() && rows.size() < 3 && (rows.empty() || random() % 4 == 0)) {
        sequences.push_back(maker.Make(prompts_[next], 200, runner->ScratchSampling()));
        Read(*runner, sequences.back());
        rows.push_back({.sequence = &sequences.back()});
        ++next;
      }
      std::shuffle(rows.begin(), rows.end(), random);
      const Drawn drawn = runner->Run({rows, PlanId::kDecoder});
      for (size_t i = 0; i < rows.size(); ++i) {
        rows[i].sequence->tokens.push_back(drawn.tokens[i][0]);
      }
      std::erase_if(rows, [&](const BatchRow& row) {
        return NumTokens(*row.sequence) == row.sequence->dense_len + kNew;
      });
    }
    for (size_t i = 0; i < prompts_.size(); ++i) {
      const Ints got(sequences[i].tokens.begin() + sequences[i].dense_len,
                     sequences[i].tokens.end());
      EXPECT_EQ(got, Alone(config, prompts_[i], kNew)) << "prompt " << i;
    }
  }
}

// Several prompts, and a decoding row beside them, in one pass of ragged shares.
TEST_P(Runner, ChunksOfSeveralPromptsEqualEachAlone) {
  if (!is_cpu()) GTEST_SKIP() << "on CUDA rows agree to rounding only";
  const auto runner = MakeRunner(Dense());
  SequenceMaker maker(*runner);
  const auto decoder = Make(Dense());
  const Prompts prompts = MakePrompts({9, 30, 1});
  std::vector<Sequence> sequences;
  Batch batch;
  sequences.reserve(prompts.size());
  for (const Ints& prompt : prompts) {
    sequences.push_back(maker.Make(prompt, 64, runner->ScratchSampling()));
    const auto count = static_cast<int64_t>(prompt.size());
    batch.rows.push_back({&sequences.back(), count, 1, std::min<int64_t>(count, 3)});
  }
  const auto logits = PlacesFor(batch);
  const Drawn drawn = runner->Run(batch);
  for (size_t i = 0; i < prompts.size(); ++i) {
    const auto want = PrefillLogits(*decoder, prompts[i], batch.rows[i].num_logits);
    EXPECT_TRUE(SameBits(Bits(logits[i]), Bits(want), 4)) << i;
    EXPECT_EQ(drawn.tokens[i], Alone(Dense(), prompts[i], 1)) << i;
    EXPECT_EQ(sequences[i].cached, NumTokens(sequences[i]));
  }
}

// More outputs than the sampler has rows for.
TEST_P(Runner, OutputsOfAWholeChunkAreThoseOfItsEnd) {
  if (!is_cpu()) GTEST_SKIP() << "on CUDA rows agree to rounding only";
  const auto runner = MakeRunner(Dense());
  SequenceMaker maker(*runner);
  Sequence sequence = maker.Make(prompts_[2], 64, runner->ScratchSampling());
  Batch whole = {{{&sequence, 41, 41, 41}}};
  const auto places = PlacesFor(whole);
  const std::vector<float>& logits = places[0];
  const Drawn all = runner->Run(whole);
  EXPECT_EQ(all.tokens[0].size(), 41u);
  for (int64_t i = 0; i < 41; ++i) {
    const auto row = logits.begin() + i * model_.vocab_size;
    const auto best = std::max_element(row, row + model_.vocab_size) - row;
    EXPECT_EQ(all.tokens[0][static_cast<size_t>(i)], best) << i;
  }
  sequence.Rewind(0);
  Batch tail = {{{&sequence, 41, 1, 3}}};
  const auto tail_logits = PlacesFor(tail);
  const Drawn end = runner->Run(tail);
  const std::vector<float> last(logits.end() - 3 * model_.vocab_size, logits.end());
  EXPECT_TRUE(SameBits(Bits(tail_logits[0]), Bits(last), 4));
  EXPECT_EQ(end.tokens[0], Ints{all.tokens[0].back()});
}

TEST_P(Runner, KnowsWhichTokensAreAsDenseReadingLeavesThem) {
  const auto runner = MakeRunner(Tidal());
  SequenceMaker maker(*runner);
  Sequence sequence = maker.Make(prompts_[0], 200, runner->ScratchSampling());
  Read(*runner, sequence);
  EXPECT_EQ(sequence.clean_len, 90);
  const auto step = [&](PlanId plan) {
    sequence.tokens.push_back(runner->Run({{{&sequence}}, plan}).tokens[0][0]);
  };
  step(PlanId::kDense);
  EXPECT_EQ(sequence.clean_len, 91);
  for (int i = 0; i < 5; ++i) step(PlanId::kDecoder);
  EXPECT_EQ(sequence.num_sparse, 5);
  EXPECT_EQ(sequence.clean_len, 91);
  // Dense reading behind tokens that are not clean makes none clean.
  step(PlanId::kDense);
  EXPECT_EQ(sequence.clean_len, 91);
  sequence.Rewind(96);
  EXPECT_EQ(sequence.num_sparse, 4);
  CorrectCache(*runner, sequence, 4);
  EXPECT_EQ(sequence.cached, 96);
  EXPECT_EQ(sequence.num_sparse, 0);
  EXPECT_EQ(sequence.clean_len, 91);  // the first sparse token was not rewritten
  sequence.Rewind(91);
  runner->Run({{{&sequence, 5, 0}}});
  EXPECT_EQ(sequence.clean_len, 96);
  sequence.Rewind(40);
  EXPECT_EQ(sequence.clean_len, 40);
}

TEST_P(Runner, APlanIsThereUntilItsLastUserDropsIt) {
  const auto runner = MakeRunner(Tidal());
  EXPECT_EQ(runner->AddPlan(Tidal()), PlanId::kDecoder);
  DecodeConfig other = Tidal();
  other.token_budget = 16;
  const PlanId plan = runner->AddPlan(other);
  EXPECT_EQ(runner->AddPlan(other), plan);
  other.granularity = Granularity::kHead;
  EXPECT_NE(runner->AddPlan(other), plan);

  SequenceMaker maker(*runner);
  Sequence sequence = maker.Make(prompts_[0], 200, runner->ScratchSampling());
  Read(*runner, sequence);
  const Batch step = {{{.sequence = &sequence, .counts_sets = true}}, plan};
  const auto run = [&] {
    sequence.Rewind(90);
    return runner->Run(step);
  };
  runner->DropPlan(plan);
  const ChosenSets sets = run().sets[0];
  EXPECT_GT(sets.num_sets, 0);
  EXPECT_EQ(sets.num_positions, 16 * sets.num_sets);
  EXPECT_EQ(runner->ReadSelection(plan, sequence.id).size(), 2u);
  EXPECT_TRUE(runner->ReadSelection(PlanId::kDecoder, sequence.id).empty());
  runner->DropPlan(plan);
  EXPECT_TRUE(Throws<InvalidArgument>(run, {"plan 2", "has gone"}));
  runner->DropPlan(PlanId::kDecoder);  // whom AddPlan counted above
  sequence.Rewind(90);
  const BatchRow row = {.sequence = &sequence, .counts_sets = true};
  EXPECT_GT(runner->Run({{row}, PlanId::kDecoder}).sets[0].num_sets, 0);
}

TEST_P(Runner, RefusesWhatAPassHasNoRoomFor) {
  DecodeConfig config = Dense();
  config.max_batch_size = 2;
  config.prefill_chunk = 16;
  const auto runner = MakeRunner(config);
  SequenceMaker maker(*runner);
  std::vector<Sequence> sequences;
  for (int i = 0; i < 3; ++i) {
    sequences.push_back(maker.Make(prompts_[0], 90, runner->ScratchSampling()));
  }
  const auto refuses = [&](const Batch& batch, std::initializer_list<std::string> parts) {
    return Throws<CapacityError>([&] { runner->Run(batch); }, parts);
  };
  EXPECT_TRUE(refuses({{{&sequences[0]}, {&sequences[1]}, {&sequences[2]}}},
                      {"3 rows", "max_batch_size 2"}));
  EXPECT_TRUE(refuses({{{&sequences[0], 9}, {&sequences[1], 8}}}, {"17 tokens", "16"}));
  sequences[0].pages.Shrink(0);
  EXPECT_TRUE(refuses({{{&sequences[1]}, {&sequences[0]}}}, {"row 1", "1 pages, it has 0"}));
  EXPECT_TRUE(Throws<InvalidArgument>(
      [&] {
        runner->Run({{{&sequences[1]}}, PlanId{77}});
      },
      {"plan 77"}));
  EXPECT_EQ(sequences[1].cached, 0);
}

INSTANTIATE_TEST_SUITE_P(Backends, Runner, ::testing::ValuesIn(DecoderBackends()),
                         CaseNameOf<BackendCase>);

// A backend that counts what goes up.
class CountingUploads final : public MemoryMeter {
 public:
  explicit CountingUploads(const Backend& measured) : MemoryMeter(measured) {}
  void Upload(const TensorView& view, const void*) override { bytes.push_back(view.bytes()); }

  // The sizes since the last call, of one upload after the other.
  std::vector<int64_t> Take() { return std::exchange(bytes, {}); }

 private:
  std::vector<int64_t> bytes;
};

class PassInputsTest : public ::testing::Test {
 protected:
  static constexpr int64_t kRows = 4;

  Sequence Make(uint64_t id) {
    return {.id = id,
            .tokens = std::vector<int32_t>(50, 7),
            .cached = 20,
            .pages = SequencePages(pool_, 30),
            .inv_freq = std::vector<float>(32, 1.0f),
            .sampling = {}};
  }
  std::vector<int64_t> Write(const std::vector<Sequence*>& sequences) {
    std::vector<PassRow> rows;
    for (const Sequence* sequence : sequences) rows.push_back({sequence, sequence->cached, 1});
    inputs_.Write(rows, passes_.Take({kRows, kRows}));
    return backend_.Take();
  }

  std::unique_ptr<Backend> cpu_ = MakeBackend(BackendOptions{});
  CountingUploads backend_{*cpu_};
  PagePool pool_{64, 10};
  PassBuffers passes_{backend_, TinyConfig(), DType::kFloat32, {kRows, kRows}, 16};
  PassInputs inputs_{backend_};
  Sequence a_ = Make(1), b_ = Make(2), c_ = Make(3);
};

TEST_F(PassInputsTest, OnlyWhatChangedGoesUp) {
  const int64_t tokens = 3 * kRows * 4, table = 3 * 4, rotation = 32 * 4;
  Write({&a_, &b_, &c_});
  EXPECT_EQ(Write({&a_, &b_, &c_}), (std::vector<int64_t>{tokens}));
  // The first row leaves and the last takes its place.
  EXPECT_EQ(Write({&c_, &b_}), (std::vector<int64_t>{tokens, 5 * 4, table, rotation}));
  EXPECT_EQ(Write({&c_, &b_}), (std::vector<int64_t>{tokens}));
  // A sequence takes another page.
  b_.pages.Own(40, 20, 20);
  EXPECT_EQ(Write({&c_, &b_}), (std::vector<int64_t>{tokens, table + 4}));
  // It gives pages back and takes as many.
  b_.pages.Shrink(10);
  b_.pages.Own(40, 20, 20);
  EXPECT_EQ(Write({&c_, &b_}), (std::vector<int64_t>{tokens, table + 4}));
}

}  // namespace
}  // namespace tidal::test
