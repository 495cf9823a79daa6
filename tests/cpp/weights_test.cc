// Loading weights: tensors larger than a piece, read and converted by several threads, arrive
// whole.
#include "model/weights.h"

#include <gtest/gtest.h>

#include "backend_test.h"
#include "tiny_model.h"

namespace tidal::test {
namespace {

class LoadedWeights : public BackendTest {};

TEST_P(LoadedWeights, OfAnyDtypeAndSizeArriveWhole) {
  ModelConfig model = TinyConfig();
  model.num_layers = 1;
  model.vocab_size = 40'961;  // x 256: two pieces and a bit in float32, one and a bit in 16 bits
  model.hidden_size = 256;
  Open(GetParam(), SmallLimits(GetParam().dtype));
  const int64_t count = model.vocab_size * model.hidden_size;
  const std::string name = "model.embed_tokens.weight";
  for (DType stored : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    SCOPED_TRACE(DTypeName(stored));
    const RandomWeightSource source(model, stored);
    int64_t last_done = 0, last_total = 0;
    const ModelWeights weights =
        LoadWeights(backend(), model, GetParam().dtype, source, [&](int64_t done, int64_t total) {
          EXPECT_GT(done, last_done);
          last_done = done;
          last_total = total;
        });
    EXPECT_EQ(last_done, last_total);
    EXPECT_EQ(last_total, MeasureWeights(backend(), model, GetParam().dtype, source).bytes);
    Bytes raw(count * DTypeBytes(stored));
    source.Read(name, 0, static_cast<int64_t>(raw.size()), raw.data());
    const Bytes want = Encode(Decode(raw, stored), GetParam().dtype);
    EXPECT_TRUE(GetBytes(weights.embedding) == want);
    // Stacked behind q and k, so not at a tensor's begin.
    const int64_t rows = model.kv_size(), first = model.q_size() + model.kv_size();
    raw.resize(rows * model.hidden_size * DTypeBytes(stored));
    source.Read("model.layers.0.self_attn.v_proj.weight", 0, static_cast<int64_t>(raw.size()),
                raw.data());
    EXPECT_TRUE(GetBytes(weights.layers[0].qkv.data.Rows(first, rows)) ==
                Encode(Decode(raw, stored), GetParam().dtype));
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, LoadedWeights, ::testing::ValuesIn(AllBackends()),
                         CaseNameOf<BackendCase>);

}  // namespace
}  // namespace tidal::test
