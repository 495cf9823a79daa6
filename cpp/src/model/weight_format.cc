// One decoder per format. All go block by block: under one scale a code has one value, so a block
// needs a table of 16 or 256 values and a look-up per element.
#include "model/weight_format.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>

#include "core/float16.h"
#include "core/float8.h"
#include "core/mxfp4.h"

namespace tidal {
namespace {

constexpr int64_t kCodesPerWord = 8;  // of 4 bits
constexpr uint8_t kMiddle = 8;        // the code of zero in symmetric int4 formats
constexpr uint8_t kMiddleOfBytes = 128;

// The place of row k of 8 in a word: from the lowest bits on.
constexpr std::array<int, 8> kInOrder = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr std::array<int, 8> kAwqOrder = {0, 4, 1, 5, 2, 6, 3, 7};

int64_t DivideUp(int64_t count, int64_t size) {
  return count / size + (count % size != 0);
}

uint8_t CodeAt(uint32_t word, int place) {
  return static_cast<uint8_t>((word >> (4 * place)) & 0xfu);
}

// Codes in a word of a format of words.
int64_t CodesInWord(WeightFormat format) {
  return format == WeightFormat::kInt8Packed ? 4 : kCodesPerWord;
}

// The numbers that the 256 codes of a byte format stand for, before zero and scale.
std::array<float, 256> ByteValues(WeightFormat format) {
  std::array<float, 256> values;
  for (size_t code = 0; code < values.size(); ++code) {
    const auto byte = static_cast<uint8_t>(code);
    values[code] = format == WeightFormat::kFloat8 ? Float8ToFloat(byte)
                   : format == WeightFormat::kInt8 ? static_cast<float>(static_cast<int8_t>(byte))
                                                   : static_cast<float>(byte);
  }
  return values;
}

// What is subtracted of the codes of a byte format, of rows that share a block.
float ZeroOfBytes(const QuantizedWeight& weight, const DecodedBlocks& blocks, int64_t row,
                  int64_t block) {
  if (weight.format != WeightFormat::kInt8Packed) return 0.0f;
  if (blocks.zeros.empty()) return kMiddleOfBytes;
  return blocks.zeros[static_cast<size_t>(row * blocks.columns + block)];
}

// Below so many elements a table costs more than it saves.
constexpr int64_t kMinTableElements = 1024;

template <typename T>
void DecodeBytes(const QuantizedWeight& weight, const DecodedBlocks& blocks, const StoredRows& rows,
                 T* out) {
  const std::array<float, 256> values = ByteValues(weight.format);
  const auto* codes = reinterpret_cast<const uint8_t*>(rows.codes);
  const int64_t in = weight.shape[1];
  const int64_t row_bytes = weight.format == WeightFormat::kInt8Packed ? DivideUp(in, 4) * 4 : in;
  std::array<T, 256> table;
  int64_t last;
  for (int64_t first = rows.begin; first < rows.end; first = last) {
    const int64_t row_block = first / weight.block_rows;
    last = std::min(rows.end, (row_block + 1) * weight.block_rows);
    for (int64_t block = 0; block < blocks.columns; ++block) {
      const float scale = blocks.scales[static_cast<size_t>(row_block * blocks.columns + block)];
      const float zero = ZeroOfBytes(weight, blocks, first, block);
      const int64_t begin = block * weight.block_columns;
      const int64_t count = std::min(in - begin, weight.block_columns);
      const bool has_table = count * (last - first) >= kMinTableElements;
      for (size_t i = 0; has_table && i < table.size(); ++i) {
        table[i] = FromFloat<T>((values[i] - zero) * scale);
      }
      for (int64_t row = first; row < last; ++row) {
        const uint8_t* from = codes + (row - rows.codes_row) * row_bytes + begin;
        T* to = out + (row - rows.begin) * in + begin;
        if (has_table) {
          for (int64_t i = 0; i < count; ++i) to[i] = table[from[i]];
        } else {
          for (int64_t i = 0; i < count; ++i)
            to[i] = FromFloat<T>((values[from[i]] - zero) * scale);
        }
      }
    }
  }
}

// The values of the 16 codes in one block.
template <typename T>
std::array<T, 16> BlockTable(const QuantizedWeight& weight, const DecodedBlocks& blocks,
                             int64_t row, int64_t block) {
  const int64_t row_block = row / weight.block_rows;
  const float scale = blocks.scales[static_cast<size_t>(row_block * blocks.columns + block)];
  const int zero = blocks.zeros.empty()
                       ? kMiddle
                       : blocks.zeros[static_cast<size_t>(row * blocks.columns + block)];
  std::array<T, 16> table;
  for (int code = 0; code < 16; ++code) {
    const auto i = static_cast<size_t>(code);
    const float value =
        weight.format == WeightFormat::kMxfp4 ? kFloat4Values[i] : static_cast<float>(code - zero);
    table[i] = FromFloat<T>(value * scale);
  }
  return table;
}

// Writes `count` elements whose codes lie along `in`, 8 to a word.
template <typename T>
void LookUpWords(const uint32_t* words, int64_t count, const std::array<T, 16>& table, T* out) {
  const int64_t whole = count / kCodesPerWord;
  for (int64_t i = 0; i < whole; ++i) {
    const uint32_t word = words[i];
    for (int k = 0; k < kCodesPerWord; ++k) out[i * kCodesPerWord + k] = table[CodeAt(word, k)];
  }
  for (int64_t i = whole * kCodesPerWord; i < count; ++i) {
    out[i] = table[CodeAt(words[whole], static_cast<int>(i % kCodesPerWord))];
  }
}

template <typename T>
void DecodePacked(const QuantizedWeight& weight, const DecodedBlocks& blocks,
                  const StoredRows& rows, T* out) {
  const int64_t in = weight.shape[1], row_words = DivideUp(in, kCodesPerWord);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const uint32_t* words = rows.codes + (row - rows.codes_row) * row_words;
    T* to = out + (row - rows.begin) * in;
    for (int64_t block = 0; block < blocks.columns; ++block) {
      const int64_t begin = block * weight.block_columns;
      LookUpWords(words + begin / kCodesPerWord, std::min(in - begin, weight.block_columns),
                  BlockTable<T>(weight, blocks, row, block), to + begin);
    }
  }
}

// Copies `count` words that lie `stride` apart.
void Gather(const uint32_t* from, int64_t stride, int64_t count, uint32_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
}

template <typename T>
void DecodeGptq(const QuantizedWeight& weight, const DecodedBlocks& blocks, const StoredRows& rows,
                T* out) {
  const int64_t num_rows = weight.shape[0], in = weight.shape[1];
  std::vector<uint32_t> words(static_cast<size_t>(DivideUp(weight.block_columns, kCodesPerWord)));
  // Neighbouring rows share the cache lines of a block's words.
  for (int64_t block = 0; block < blocks.columns; ++block) {
    const int64_t begin = block * weight.block_columns;
    const int64_t count = std::min(in - begin, weight.block_columns);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      Gather(rows.codes + begin / kCodesPerWord * num_rows + row, num_rows, count / kCodesPerWord,
             words.data());
      LookUpWords(words.data(), count, BlockTable<T>(weight, blocks, row, block),
                  out + (row - rows.begin) * in + begin);
    }
  }
}

template <typename T>
void DecodeAwq(const QuantizedWeight& weight, const DecodedBlocks& blocks, const StoredRows& rows,
               T* out) {
  const int64_t row_words = weight.shape[0] / kCodesPerWord, in = weight.shape[1];
  std::vector<uint32_t> words(static_cast<size_t>(weight.block_columns));
  for (int64_t block = 0; block < blocks.columns; ++block) {
    const int64_t begin = block * weight.block_columns;
    const int64_t count = std::min(in - begin, weight.block_columns);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      if (row == rows.begin || row % kCodesPerWord == 0) {
        Gather(rows.codes + begin * row_words + row / kCodesPerWord, row_words, count,
               words.data());
      }
      const int place = kAwqOrder[static_cast<size_t>(row % kCodesPerWord)];
      const std::array<T, 16> table = BlockTable<T>(weight, blocks, row, block);
      T* to = out + (row - rows.begin) * in + begin;
      for (int64_t i = 0; i < count; ++i)
        to[i] = table[CodeAt(words[static_cast<size_t>(i)], place)];
    }
  }
}

// Small, and what it chooses and weighs is sensitive.
bool IsOfRouter(const std::string& name) {
  return name.ends_with(".mlp.gate.weight") || name.ends_with(".mlp.shared_expert_gate.weight");
}

}  // namespace

PartShapes ExpectedParts(const QuantizedWeight& weight) {
  const int64_t out = weight.shape[0], in = weight.shape[1];
  const int64_t blocks = DivideUp(in, weight.block_columns);
  const int64_t row_blocks = DivideUp(out, weight.block_rows);
  const int64_t in_word = CodesInWord(weight.format);
  const int64_t out_words = DivideUp(out, in_word), in_words = DivideUp(in, in_word);
  switch (weight.format) {
    case WeightFormat::kInt4Packed:
    case WeightFormat::kInt8Packed:
      return {{out, in_words}, {row_blocks, blocks}, {out_words, blocks}};
    case WeightFormat::kInt4Gptq:
      return {{in_words, out}, {blocks, row_blocks}, {blocks, out_words}};
    case WeightFormat::kInt4Awq:
      return {{in, out_words}, {blocks, row_blocks}, {blocks, out_words}};
    case WeightFormat::kMxfp4:
      return {{out, in / 2}, {row_blocks, blocks}, {}};
    default:
      return {{out, in}, {row_blocks, blocks}, {}};
  }
}

bool RowsLieApart(WeightFormat format) {
  return format != WeightFormat::kInt4Gptq && format != WeightFormat::kInt4Awq;
}

DecodedBlocks DecodeBlocks(const QuantizedWeight& weight, const float* scales,
                           const uint32_t* zeros) {
  const int64_t out = weight.shape[0], columns = DivideUp(weight.shape[1], weight.block_columns);
  const int64_t row_blocks = DivideUp(out, weight.block_rows);
  const bool apart = RowsLieApart(weight.format);
  DecodedBlocks blocks{.columns = columns, .scales = {}, .zeros = {}};
  blocks.scales.resize(static_cast<size_t>(row_blocks * columns));
  for (int64_t row = 0; row < row_blocks; ++row) {
    for (int64_t block = 0; block < columns; ++block) {
      blocks.scales[static_cast<size_t>(row * columns + block)] =
          scales[apart ? row * columns + block : block * row_blocks + row];
    }
  }
  if (zeros == nullptr) return blocks;
  const std::array<int, 8>& order = weight.format == WeightFormat::kInt4Awq ? kAwqOrder : kInOrder;
  const int64_t in_word = CodesInWord(weight.format), out_words = DivideUp(out, in_word);
  const auto bits = static_cast<int>(32 / in_word);
  const uint32_t mask = (1u << bits) - 1;
  blocks.zeros.resize(static_cast<size_t>(out * columns));
  for (int64_t row = 0; row < out; ++row) {
    const int64_t word = row / in_word;
    const int place = order[static_cast<size_t>(row % in_word)];
    for (int64_t block = 0; block < columns; ++block) {
      const uint32_t packed = zeros[apart ? word * columns + block : block * out_words + word];
      blocks.zeros[static_cast<size_t>(row * columns + block)] = static_cast<uint8_t>(
          ((packed >> (bits * place)) + static_cast<uint32_t>(weight.zero_offset)) & mask);
    }
  }
  return blocks;
}

template <typename T>
void DecodeRows(const QuantizedWeight& weight, const DecodedBlocks& blocks, const StoredRows& rows,
                T* out) {
  switch (weight.format) {
    case WeightFormat::kFloat8:
    case WeightFormat::kInt8:
    case WeightFormat::kInt8Packed:  // words are bytes, the first the lowest
      return DecodeBytes(weight, blocks, rows, out);
    case WeightFormat::kInt4Packed:
    case WeightFormat::kMxfp4:
      return DecodePacked(weight, blocks, rows, out);
    case WeightFormat::kInt4Gptq:
      return DecodeGptq(weight, blocks, rows, out);
    case WeightFormat::kInt4Awq:
      return DecodeAwq(weight, blocks, rows, out);
  }
}

bool IsOfExpert(const std::string& name) {
  return name.find(".mlp.experts.") != std::string::npos;
}

CodedInfo CodesOf(const std::string& name, const WeightInfo& info, const MadeCodes& made) {
  constexpr int64_t kInt4Group = 128;
  const bool is_of_part = made.part == CodedPart::kLmHead
                              ? name == kLmHeadName
                              : name.starts_with("model.layers.") && !IsOfRouter(name);
  if (made.codes == WeightCodes::kNone || !is_of_part || info.shape.size() != 2 ||
      info.shape[1] % kCodesPerWord != 0) {
    return {};
  }
  const int64_t in = info.shape[1];
  if (made.codes == WeightCodes::kMxfp4) {
    if (!IsOfExpert(name) || in % kMxfp4Group != 0) return {};
    return {.codes = made.codes, .group_size = kMxfp4Group, .scale_dtype = DType::kUInt8};
  }
  return {.codes = made.codes,
          .group_size = made.codes == WeightCodes::kInt4 ? std::min(kInt4Group, in) : in,
          .scale_dtype = made.scale_dtype};
}

bool HoldsNan(const uint8_t* codes, int64_t count) {
  uint8_t found = 0;
  for (int64_t i = 0; i < count; ++i) found |= static_cast<uint8_t>((codes[i] & 0x7f) == 0x7f);
  return found != 0;
}

void PackRows(const QuantizedWeight& weight, const StoredRows& rows, uint32_t* out) {
  const int64_t num_rows = weight.shape[0], row_words = weight.shape[1] / kCodesPerWord;
  const int64_t stored_words = num_rows / kCodesPerWord;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    uint32_t* to = out + (row - rows.begin) * row_words;
    if (RowsLieApart(weight.format)) {
      std::copy_n(rows.codes + (row - rows.codes_row) * row_words, row_words, to);
    } else if (weight.format == WeightFormat::kInt4Gptq) {
      Gather(rows.codes + row, num_rows, row_words, to);
    } else {
      const int place = kAwqOrder[static_cast<size_t>(row % kCodesPerWord)];
      const uint32_t* from = rows.codes + row / kCodesPerWord;
      for (int64_t i = 0; i < row_words; ++i) {
        uint32_t word = 0;
        for (int k = 0; k < kCodesPerWord; ++k) {
          word |= uint32_t{CodeAt(*from, place)} << (4 * k);
          from += stored_words;
        }
        to[i] = word;
      }
    }
  }
}

template void DecodeRows(const QuantizedWeight&, const DecodedBlocks&, const StoredRows&, float*);
template void DecodeRows(const QuantizedWeight&, const DecodedBlocks&, const StoredRows&,
                         BFloat16*);
template void DecodeRows(const QuantizedWeight&, const DecodedBlocks&, const StoredRows&, Float16*);

}  // namespace tidal
