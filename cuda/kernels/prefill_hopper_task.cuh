// How attention_prefill_hopper.cuh deals tiles of queries, and the tokens that they see, to blocks.
#pragma once

#include <cstdint>

#include "common/launch_config.h"
#include "common/score_rule.cuh"

namespace tidal {

inline constexpr int kPrefillRows = kPromptRows;      // of a tile of queries
inline constexpr int kPrefillTokens = kPromptTokens;  // of a tile of K or V

// What the splits of tiles leave to be merged: for each split of each split tile
// [D / 8 + 1][threads of both groups]. A thread's last is the maxima and sums of its two rows, the
// others are its part of the unnormalised output.
struct PrefillParts {
  float4* values;
  uint32_t* counters;  // [split tiles]: splits that are written
};

template <typename T>
struct PrefillHopperParams {
  const int32_t* q_starts;    // [B + 1]
  const int32_t* seq_lens;    // [B]
  const int32_t* page_table;  // [B, max_pages]
  int max_pages;
  int num_pages;
  int page_shift;  // log2(page_size)
  PromptRule rule;
  float out_scale;
  int num_kv_heads;
  int group_size;
  int tile_queries;  // of a tile: as many as have all heads in it
  int row_tiles;     // of a row of the batch and a KV head
  int num_tiles;
  PromptSplits splits;
  PrefillParts parts;
  T* out;  // [T, Hq, D]
};

// What a block works on.
struct PrefillHopperTask {
  int batch;
  int kv_head;
  int first_query;     // of q and out
  int num_rows;        // 1 to 128: its queries x the heads of a group
  int first_position;  // of its first query
  int kv_end;          // tokens up to its last query's
  // The tiles of K and V that are the block's; none if the tile has fewer splits.
  int first_tile;
  int end_tile;
  int split_tile;  // of those that are split; negative: it is not
  int split;
  int num_used;  // splits of the tile that have tokens
};

// The blocks of a grid in their order: whole tiles, then the first split of all others, the second
// and so on, so that blocks that read the same tokens run at the same time. Of a KV head the last
// queries, which see the most tokens, come first.
template <typename T>
__device__ __forceinline__ PrefillHopperTask TaskOf(const PrefillHopperParams<T>& params,
                                                    int block) {
  const PromptSplits& splits = params.splits;
  int tile = block, split = 0;
  if (block >= splits.num_whole) {
    int num_split = params.num_tiles - splits.num_whole;
    split = (block - splits.num_whole) / num_split;
    tile = splits.num_whole + (block - splits.num_whole) % num_split;
  }
  int of_batch = tile / params.row_tiles;
  int first_query = (params.row_tiles - 1 - tile % params.row_tiles) * params.tile_queries;
  int batch = of_batch / params.num_kv_heads;
  int q_start = __ldg(params.q_starts + batch);
  int q_len = __ldg(params.q_starts + batch + 1) - q_start;
  int num_queries = min(params.tile_queries, q_len - first_query);
  int first_position = __ldg(params.seq_lens + batch) - q_len + first_query;
  int kv_end = first_position + num_queries;
  int begin_tile = max(first_position - params.rule.window + 1, 0) / kPrefillTokens;
  int num_tiles = (kv_end + kPrefillTokens - 1) / kPrefillTokens - begin_tile;
  bool is_split = tile >= splits.num_whole;
  int span = is_split ? splits.span : num_tiles;
  return {.batch = batch,
          .kv_head = of_batch % params.num_kv_heads,
          .first_query = q_start + first_query,
          .num_rows = num_queries * params.group_size,
          .first_position = first_position,
          .kv_end = kv_end,
          .first_tile = begin_tile + split * span,
          .end_tile = begin_tile + min((split + 1) * span, num_tiles),
          .split_tile = tile - splits.num_whole,
          .split = split,
          .num_used = is_split ? (num_tiles + span - 1) / span : 1};
}

// The tiles of tokens [begin, end) of which queries, from the one at first_position to the one at
// last_position, see all tokens.
struct WholeTiles {
  int begin;
  int end;

  __device__ __forceinline__ WholeTiles(int first_position, int last_position, int window)
      : begin((max(last_position - window + 1, 0) + kPrefillTokens - 1) / kPrefillTokens),
        end((first_position + 1) / kPrefillTokens) {}
};

}  // namespace tidal
