// Verifier: the dense pass of verified decoding. Tokens that a sequence has and the cache has not
// go through all layers densely, many at once, and the successor of each is drawn as a dense decode
// step would draw it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/device_tensors.h"
#include "decode/pass.h"
#include "decode/sampler.h"
#include "decode/transformer.h"
#include "kv/sequence.h"

namespace tidal {

struct VerifierLimits {
  DeviceType device = DeviceType::kCpu;
  int64_t max_batch_size = 0;
  int64_t max_tokens_per_row = 0;
  int64_t max_seq_len = 0;
  int64_t max_pages = 0;  // of one sequence
};

class Verifier {
 public:
  // All referenced objects must outlive this one.
  Verifier(Backend& backend, const ModelConfig& model, DType act, const SeenTokens& seen,
           const VerifierLimits& limits);

  // Caches the tokens of each row from `cached` on: 1 to max_tokens_per_row, of one row at least 2.
  // Returns the tokens drawn after them (-1: unusable logits). A draw of a row with a repetition
  // penalty counts those before it as seen.
  std::vector<std::vector<int32_t>> Run(const Transformer& transformer,
                                        std::span<Sequence* const> rows);

  // Runs the pass of a batch_size and tokens_per_row that a step has (StepSize) twice, with idle
  // rows, so that a device that records it has done so.
  void Warm(const Transformer& transformer, int64_t batch_size, int64_t tokens_per_row);

 private:
  // A token of a row; the order of the draws: the first of each row, then the second, ...
  struct Draw {
    size_t row;
    int64_t offset;  // of the token among those of its row
  };
  struct Shape {
    int64_t batch_size, tokens_per_row, num_tokens;
  };

  Shape ShapeFor(std::span<Sequence* const> rows) const;
  void RunPass(const Transformer& transformer, const Shape& shape, const Pass& pass);
  void UploadTokens(std::span<Sequence* const> rows, const Pass& pass);
  void UploadDraws(std::span<Sequence* const> rows, const std::vector<Draw>& draws,
                   int64_t num_tokens);
  void Sample(std::span<Sequence* const> rows, const std::vector<Draw>& draws);

  Backend& backend_;
  VerifierLimits limits_;
  PassBuffers buffers_;
  Sampler sampler_;
  SamplingRow idle_;
  DeviceTensors tensors_;
  TensorView q_starts_;         // [max_batch_size + 1] int32
  TensorView gather_rows_;      // [T] int32: the token of each draw
  TensorView draw_lens_;        // [T] int32: tokens before each draw; 0 = no draw
  TensorView gathered_;         // [T, H] float32
  std::vector<uint64_t> rows_;  // ids whose page tables are in buffers_
};

}  // namespace tidal
