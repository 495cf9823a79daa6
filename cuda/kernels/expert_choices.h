// Experts on the GPU: which a token has, their choices in order of experts, and what they add.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/op_args.h"

namespace tidal {

// Some choices of one expert: order[first] to order[first + count - 1].
struct ExpertTile {
  int32_t expert;
  int32_t first;
  int32_t count;
};

// Choices (token * k + place among the token's) sorted by expert, and cut into tiles.
struct ExpertOrder {
  int32_t* order;      // [C]
  ExpertTile* tiles;   // [max_tiles]
  int32_t* num_tiles;  // [1]
  int32_t max_tiles;
  int32_t tile_choices;  // of a tile, at most

  // For num_choices of num_experts; `memory` of OrderBytes, or null.
  static ExpertOrder In(void* memory, int64_t num_choices, int64_t num_experts,
                        int64_t tile_choices);
  static int64_t OrderBytes(int64_t num_choices);
};

void LaunchSelectExperts(const SelectExpertsArgs& args, cudaStream_t stream);

// Fills `order` with expert_ids [T, k], in an order of each expert's choices that is anyone's
// guess.
void LaunchOrderChoices(const TensorView& expert_ids, int64_t num_experts, const ExpertOrder& order,
                        cudaStream_t stream);

// Both, of few tokens (OrdersAtOnce) in one kernel.
bool OrdersAtOnce(const SelectExpertsArgs& args);
void LaunchSelectAndOrder(const SelectExpertsArgs& args, const ExpertOrder& order,
                          cudaStream_t stream);

void LaunchAddExperts(const AddExpertsArgs& args, cudaStream_t stream);

}  // namespace tidal
