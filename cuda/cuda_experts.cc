// Experts: which a token has, their products, and what they add (kernels/expert_choices.h,
// expert_linear.h).
#include "backend/check_args.h"
#include "cuda_backend.h"
#include "cuda_dtypes.h"
#include "kernels/expert_choices.h"
#include "kernels/expert_linear.h"
#include "kernels/gate_rows.h"

namespace tidal {
namespace {

// From so many choices for each expert on, in the mean, tiles of many are the faster way
// (estimated).
constexpr int64_t kManyChoices = 8;

int64_t NumExperts(const ExpertLinearArgs& args) {
  return args.weight.num_outputs() / args.out.dim(1);
}

void CheckExperts(const ExpertLinearArgs& args) {
  CheckSameDType("expert_linear", {&args.x, &args.out, &args.bias});
  if (!args.weight.is_coded()) CheckSameDType("expert_linear", {&args.x, &args.weight.data});
  TIDAL_CHECK(TakesExperts(args.weight, args.out.dim(1)), UnsupportedError,
              "expert_linear: ", args.weight.num_inputs(), " inputs and ", args.out.dim(1),
              " outputs of an expert on CUDA; expected a multiple of 8, of 32 in codes, and of ",
              "2 (or use device=\"cpu\")");
}

}  // namespace

int64_t CudaBackend::ChoicesOfTile(const ExpertLinearArgs& args) const {
  if (!TilesExperts(args.weight)) return kStreamedChoices;
  const bool is_many =
      batch_invariant_ ? !in_step_ : args.out.dim(0) >= kManyChoices * NumExperts(args);
  return is_many ? kTiledChoices : kStreamedChoices;
}

ExpertOrder CudaBackend::OrderFor(const ExpertLinearArgs& args) {
  const int64_t num_choices = args.expert_ids.numel();
  void* memory = Grow(expert_order_, ExpertOrder::OrderBytes(num_choices), kExpertsPurpose);
  return ExpertOrder::In(memory, num_choices, NumExperts(args), ChoicesOfTile(args));
}

bool CudaBackend::ReadsCodesOfExperts(const Weight& weight) const {
  return TakesExperts(weight, weight.num_outputs());
}

void CudaBackend::GateRows(const GateRowsArgs& args) {
  Enter();
  Check(args);
  CheckSameDType("gate_rows", {&args.x, &args.weight, &args.out});
  LaunchGateRows(args, stream());
}

void CudaBackend::SelectExperts(const SelectExpertsArgs& args) {
  Enter();
  Check(args);
  LaunchSelectExperts(args, stream());
}

void CudaBackend::ExpertLinear(const ExpertLinearArgs& args) {
  Enter();
  Check(args);
  CheckExperts(args);
  if (args.out.dim(0) == 0) return;
  const ExpertOrder order = OrderFor(args);
  LaunchOrderChoices(args.expert_ids, NumExperts(args), order, stream());
  LaunchExpertLinear(args, nullptr, order, num_sms_, stream());
}

void CudaBackend::AddExperts(const AddExpertsArgs& args) {
  Enter();
  Check(args);
  CheckDType(args.x.dtype, "add_experts");
  LaunchAddExperts(args, stream());
}

void CudaBackend::ExpertMlp(const ExpertMlpArgs& args) {
  Enter();
  Check(args);
  CheckExperts(args.gate_up);
  CheckExperts(args.down);
  if (args.gate_up.out.dim(0) == 0) return;
  const ExpertOrder order = OrderFor(args.gate_up);
  if (OrdersAtOnce(args.select)) {
    LaunchSelectAndOrder(args.select, order, stream());
  } else {
    LaunchSelectExperts(args.select, stream());
    LaunchOrderChoices(args.select.expert_ids, args.select.logits.dim(1), order, stream());
  }
  LaunchExpertLinear(args.gate_up, &args.gate_mul, order, num_sms_, stream());
  if (ChoicesOfTile(args.down) == order.tile_choices) {
    LaunchExpertLinear(args.down, nullptr, order, num_sms_, stream());
  } else {
    ExpertLinear(args.down);
  }
  LaunchAddExperts(args.add, stream());
}

}  // namespace tidal
