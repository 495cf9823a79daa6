// What the formats of quantised matrices mean: stored codes, scales and zeros in, numbers out.
// A kernel that reads a format as it is stored must give these numbers.
//
// Sources: compressed-tensors 0.20 (compressors/pack_quantized, naive_quantized), AutoAWQ
// (packing_utils.py), AutoGPTQ (qlinear_cuda.py), transformers (integrations/mxfp4.py).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tidal/quantized_weights.h"

namespace tidal {

// Scales and zeros of a matrix in one layout for all formats.
struct DecodedBlocks {
  int64_t columns = 0;         // blocks beside each other
  std::vector<float> scales;   // [row blocks, columns]
  std::vector<uint8_t> zeros;  // [out, columns] of packed integers; empty: the middle
};

// The shapes that the parts of a matrix must have.
struct PartShapes {
  std::vector<int64_t> codes;
  std::vector<int64_t> scales;
  std::vector<int64_t> zeros;
};
PartShapes ExpectedParts(const QuantizedWeight& weight);

// Whether the rows of a matrix lie apart in its stored codes, so that some can be read alone.
bool RowsLieApart(WeightFormat format);

// Brings scales (as float32, in stored order) and stored zeros (nullptr if there are none) into
// the layout of DecodedBlocks.
DecodedBlocks DecodeBlocks(const QuantizedWeight& weight, const float* scales,
                           const uint32_t* zeros);

// Rows of a matrix, and where their codes are.
struct StoredRows {
  const uint32_t* codes;  // from the row `codes_row` on; of all rows unless RowsLieApart
  int64_t codes_row = 0;
  int64_t begin = 0;
  int64_t end = 0;
};

// Writes the elements of rows [begin, end) to `out` [end - begin, in], each rounded once to T:
// float, BFloat16 or Float16.
template <typename T>
void DecodeRows(const QuantizedWeight& weight, const DecodedBlocks& blocks, const StoredRows& rows,
                T* out);

// Whether a tensor of this name is one of an expert.
bool IsOfExpert(const std::string& name);

// The codes in which a tensor of that part of a model is made, scales in `scale_dtype`: float8 with
// a scale for each row, int4 with one for every 128 inputs; those of experts in MXFP4 too, with its
// own scales. kNone for any other tensor.
struct MadeCodes {
  CodedPart part;
  WeightCodes codes;
  DType scale_dtype;
};
CodedInfo CodesOf(const std::string& name, const WeightInfo& info, const MadeCodes& made);

// Whether a byte of kFloat8 stands for no number.
bool HoldsNan(const uint8_t* codes, int64_t count);

// Writes the codes of rows [begin, end) of a matrix in 4 bits to `out` [end - begin, in / 8], 8
// along `in` in a word, the first in the lowest bits: as kInt4Packed and kMxfp4 store them.
void PackRows(const QuantizedWeight& weight, const StoredRows& rows, uint32_t* out);

}  // namespace tidal
