#include "decode/memory_plan.h"

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <limits>
#include <sstream>

#include "backend/memory_meter.h"
#include "core/checked.h"
#include "decode/runner_buffers.h"
#include "decode/selection.h"
#include "decode/settings.h"
#include "decode/shadow_balance.h"
#include "kv/paged_kv_cache.h"
#include "kv/shadow_cache.h"
#include "model/model_config.h"
#include "model/weights.h"

namespace tidal {
namespace {

std::string Bytes(int64_t bytes) {
  std::ostringstream out;
  double mebibytes = static_cast<double>(bytes) / (1 << 20);
  if (mebibytes < 1024) {
    out << std::fixed << std::setprecision(1) << mebibytes << " MiB";
  } else {
    out << std::fixed << std::setprecision(2) << mebibytes / 1024 << " GiB";
  }
  return out.str();
}

// The largest n in [0, limit] for which fits(n); fits is true up to some n and false beyond. 0 if
// there is none.
template <typename Fits>
int64_t LargestFitting(int64_t limit, const Fits& fits) {
  int64_t low = 0, high = limit;
  while (low < high) {
    int64_t middle = low + (high - low + 1) / 2;
    if (fits(middle)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

int64_t ShadowBytesPerPage(const ModelConfig& model, const DecodeConfig& config,
                           const DecodePlan& plan) {
  if (config.shadow == Shadow::kNone) return 0;
  auto num_layers = static_cast<int64_t>(plan.LayersOf(LayerKind::kScored).size());
  return ShadowCache::BytesPerPage(model, num_layers, config.page_size);
}

constexpr int64_t kMaxPages = std::numeric_limits<int32_t>::max();  // ids are 32-bit on the device

class Planner {
 public:
  Planner(const Backend& backend, const ModelConfig& model, const DecodeConfig& asked,
          const DecodePlan& plan, const WeightMemory& weights)
      : backend_(backend),
        model_(model),
        asked_(asked),
        plan_(plan),
        info_(backend.info()),
        weights_(weights),
        page_bytes_(Sum({PagedKvCache::BytesPerPage(model, asked.kv_dtype, asked.page_size),
                         ShadowBytesPerPage(model, asked, plan)})),
        usable_bytes_(Usable(asked.gpu_memory_utilization)) {}

  ResolvedSettings Resolve() const {
    DecodeConfig config = asked_;
    config.activation_format = ActivationFormat();
    if (config.max_seq_len == 0) config.max_seq_len = FittingSeqLen();
    ResolvedSettings resolved = PlanFor(config);
    MemoryPlan& memory = resolved.memory;
    if (memory.total_bytes() > usable_bytes_) memory.problem = Explain(resolved);
    return resolved;
  }

 private:
  KeepActivations ActivationFormat() const {
    if (weights_.quantized_inputs > 0) return KeepActivations::kFloat8;
    TIDAL_CHECK(asked_.activation_format != KeepActivations::kFloat8, ConfigError,
                "activation_format: got \"fp8\", but no matrix of a layer, experts left out, is in "
                "fp8 codes on ",
                info_.name,
                "; expected \"auto\" or \"16bit\", weight_format \"fp8\", an fp8 checkpoint, or a "
                "GPU of compute capability 9.0");
    return KeepActivations::kPlain;
  }

  int64_t Usable(double share) const {
    auto part = [&](int64_t bytes) {
      return static_cast<int64_t>(share * static_cast<double>(bytes));
    };
    // Other programs need a host's memory too.
    if (info_.device.type == DeviceType::kCpu) return part(info_.free_bytes);
    return std::min(part(info_.total_bytes), info_.free_bytes);
  }

  // `config` has a max_seq_len. As many pages as fit; if the rest leaves no room, those of one
  // sequence all the same.
  ResolvedSettings PlanFor(DecodeConfig config) const {
    if (config.prefill_chunk == 0) config.prefill_chunk = info_.prefill_chunk;
    config.prefill_chunk = std::min(config.prefill_chunk, config.max_seq_len);
    ResolvePlanSettings(backend_, config.max_seq_len, config);

    MemoryMeter meter(backend_);
    RunnerBuffers buffers(meter, model_, config, plan_);
    Selection selection(meter, model_, config, plan_);
    if (config.shadow != Shadow::kNone) ShadowMemory(meter, config);
    StepLimits limits = LimitsFor(backend_, model_, config, plan_);
    limits.decoded_bytes = weights_.decoded_bytes;
    limits.quantized_inputs = weights_.quantized_inputs;
    BackendMemory own = backend_.PlanReserve(limits);
    MemoryPlan memory;
    memory.device = info_.name;
    memory.max_seq_len = config.max_seq_len;
    memory.max_batch_size = config.max_batch_size;
    memory.weight_bytes = weights_.bytes;
    memory.scratch = meter.allocated();
    for (const MemoryItem& item : own.scratch) AddItem(memory.scratch, item);
    memory.reserve_bytes = own.reserve_bytes;
    memory.host_bytes = own.host_bytes;
    memory.device_bytes = info_.total_bytes;
    memory.free_bytes = info_.free_bytes;
    memory.usable_bytes = usable_bytes_;

    if (config.num_pages == 0) {
      int64_t fitting = (usable_bytes_ - memory.total_bytes()) / page_bytes_;
      config.num_pages = std::clamp(fitting, PagesOfLongest(config),
                                    Product({PagesOfLongest(config), config.max_batch_size}));
      config.num_pages = std::min(config.num_pages, kMaxPages);
    }
    memory.num_pages = config.num_pages;
    memory.page_size = config.page_size;
    memory.kv_bytes = Product({config.num_pages, page_bytes_});
    return {config, memory};
  }

  // What a shadow takes beside its pages: factors, and once pages to measure them in.
  void ShadowMemory(Backend& meter, const DecodeConfig& config) const {
    auto num_layers = static_cast<int64_t>(plan_.LayersOf(LayerKind::kScored).size());
    const MemoryItem factors = ShadowCache::Factors(model_, num_layers);
    meter.Allocate(factors.bytes, factors.purpose);
    MakeBalancePages(meter, model_, config);
  }

  bool Fits(const DecodeConfig& config) const {
    return PlanFor(config).memory.total_bytes() <= usable_bytes_;
  }

  // The longest, up to `limit` and in whole pages below it, that fits; 0: none.
  int64_t LongestFitting(DecodeConfig config, int64_t limit) const {
    config.max_seq_len = limit;
    if (Fits(config)) return limit;
    return config.page_size * LargestFitting((limit - 1) / config.page_size, [&](int64_t pages) {
             config.max_seq_len = std::max(pages, int64_t{1}) * config.page_size;
             return Fits(config);
           });
  }

  int64_t FittingSeqLen() const {
    int64_t longest = LongestFitting(asked_, model_.max_position_embeddings);
    return std::max(longest, std::min(asked_.page_size, model_.max_position_embeddings));
  }

  // What a plan that does not fit needs, what there is, and what changes it.
  std::string Explain(const ResolvedSettings& resolved) const {
    const MemoryPlan& memory = resolved.memory;
    const DecodeConfig& config = resolved.config;
    std::ostringstream out;
    out << "memory: need " << Bytes(memory.total_bytes()) << " on " << info_.name << " (weights "
        << Bytes(memory.weight_bytes) << ", KV cache " << Bytes(memory.kv_bytes) << " for "
        << (asked_.num_pages == 0 ? Concat("one sequence of max_seq_len ", config.max_seq_len)
                                  : Concat("num_pages ", config.num_pages))
        << ", scratch " << Bytes(memory.scratch_bytes()) << " for max_batch_size "
        << config.max_batch_size;
    if (memory.reserve_bytes > 0) out << ", the device itself " << Bytes(memory.reserve_bytes);
    out << "), have " << Bytes(usable_bytes_);
    if (info_.device.type == DeviceType::kCpu) {
      out << " (a share of " << config.gpu_memory_utilization << " of the "
          << Bytes(info_.free_bytes) << " that are free)";
    } else {
      out << " (gpu_memory_utilization " << config.gpu_memory_utilization << " of "
          << Bytes(info_.total_bytes) << ", " << Bytes(info_.free_bytes) << " free)";
    }
    out << "; " << Remedy(resolved);
    return out.str();
  }

  std::string Remedy(const ResolvedSettings& resolved) const {
    int64_t need = resolved.memory.total_bytes();
    std::vector<std::string> ways;
    DecodeConfig config = asked_;
    config.max_seq_len = resolved.config.max_seq_len;
    if (config.num_pages != 0) {
      MemoryPlan without_cache = resolved.memory;
      without_cache.kv_bytes = 0;
      int64_t room = usable_bytes_ - without_cache.total_bytes();
      if (room >= page_bytes_) ways.push_back(Concat("lower num_pages to ", room / page_bytes_));
    }
    int64_t longest = LongestFitting(config, config.max_seq_len);
    if (longest > 0) ways.push_back(Concat("lower max_seq_len to ", longest));
    DecodeConfig smaller = config;
    int64_t rows = LargestFitting(config.max_batch_size, [&](int64_t batch_size) {
      smaller.max_batch_size = std::max(batch_size, int64_t{1});
      return Fits(smaller);
    });
    if (rows > 0) ways.push_back(Concat("lower max_batch_size to ", rows));
    if (need <= Usable(1.0)) {
      // Rounded up to a hundredth.
      int64_t whole = info_.device.type == DeviceType::kCpu ? info_.free_bytes : info_.total_bytes;
      double share =
          std::ceil(100.0 * static_cast<double>(need) / static_cast<double>(whole)) / 100.0;
      ways.push_back(Concat("raise gpu_memory_utilization to ", std::min(share, 1.0)));
    }
    if (ways.empty()) {
      return "use a smaller dtype, a smaller model or another device, or end other programs on it";
    }
    std::string text = ways[0];
    for (size_t i = 1; i < ways.size(); ++i) text += ", or " + ways[i];
    return text;
  }

  const Backend& backend_;
  const ModelConfig& model_;
  const DecodeConfig& asked_;
  const DecodePlan& plan_;
  BackendInfo info_;
  WeightMemory weights_;
  int64_t page_bytes_;
  int64_t usable_bytes_;
};

// The sizes that steps of up to max_count rows (or tokens of a row) have, ascending, the first
// `most` of them.
std::vector<int64_t> StepSizes(DeviceType device, int64_t first, int64_t max_count, size_t most) {
  std::vector<int64_t> sizes;
  for (int64_t count = first; count <= max_count && sizes.size() < most;) {
    sizes.push_back(StepSize(device, count, max_count));
    count = sizes.back() + 1;
  }
  return sizes;
}

}  // namespace

int64_t MemoryPlan::scratch_bytes() const {
  int64_t total = 0;
  for (const MemoryItem& item : scratch) total = Sum({total, item.bytes});
  return total;
}

int64_t MemoryPlan::total_bytes() const {
  return Sum({weight_bytes, kv_bytes, scratch_bytes(), reserve_bytes});
}

ResolvedSettings ResolveSettings(const Backend& backend, const ModelConfig& model,
                                 const DecodeConfig& config, const DecodePlan& plan,
                                 const WeightMemory& weights) {
  return Planner(backend, model, config, plan, weights).Resolve();
}

StepLimits LimitsFor(const Backend& backend, const ModelConfig& model, const DecodeConfig& config,
                     const DecodePlan& plan) {
  auto num_recorded = static_cast<int64_t>(RecordedSteps(backend, config, plan).size());
  return {.model = model,
          .dtype = config.dtype,
          .kv_dtype = config.kv_dtype,
          .max_batch_size = config.max_batch_size,
          .max_seq_len = config.max_seq_len,
          .prefill_chunk = config.prefill_chunk,
          .tokens_per_row = TokensPerRow(config, plan),
          .page_size = config.page_size,
          .num_pages = config.num_pages,
          .token_budget = plan.is_dense() ? 0 : config.token_budget,
          .granularity = config.granularity,
          .shadow = config.shadow,
          .num_recorded_steps = num_recorded};
}

std::vector<StepKey> RecordedSteps(const Backend& backend, const DecodeConfig& config,
                                   const DecodePlan& plan) {
  auto most = static_cast<size_t>(backend.info().max_recorded_steps);
  std::vector<StepKey> keys;
  if (most == 0) return keys;
  for (int64_t b : StepSizes(config.device.type, 1, config.max_batch_size, most)) {
    keys.push_back({.batch_size = b});
    if (!plan.is_dense()) keys.push_back({.batch_size = b, .plan = PlanId::kDecoder});
    // A pass over drafts has at least two tokens of a row.
    if (!Verifies(config, plan)) continue;
    for (int64_t t : StepSizes(config.device.type, 2, TokensPerRow(config, plan), most)) {
      keys.push_back({.batch_size = b, .tokens_per_row = t});
    }
  }
  keys.resize(std::min(keys.size(), most));
  return keys;
}

int64_t AddedPlanBytes(const Backend& backend, const ModelConfig& model, const DecodeConfig& config,
                       const DecodePlan& plan) {
  if (plan.is_dense()) return 0;  // runs the decoder's dense steps
  MemoryMeter meter(backend);
  Selection selection(meter, model, config, plan);
  int64_t bytes = Product({config.num_pages, ShadowBytesPerPage(model, config, plan)});
  for (const MemoryItem& item : meter.allocated()) bytes = Sum({bytes, item.bytes});
  StepLimits limits = LimitsFor(backend, model, config, plan);
  const auto most = static_cast<size_t>(backend.info().max_recorded_steps);
  limits.num_recorded_steps = 0;
  const int64_t without = backend.PlanReserve(limits).reserve_bytes;
  limits.num_recorded_steps =
      static_cast<int64_t>(StepSizes(config.device.type, 1, config.max_batch_size, most).size());
  return Sum({bytes, backend.PlanReserve(limits).reserve_bytes - without});
}

MemoryPlan PlanMemory(const ModelConfig& model, const DecodeConfig& config,
                      const WeightSource& weights) {
  ValidateModelConfig(model);
  ValidateDecodeConfig(config);
  std::unique_ptr<Backend> backend = MakeBackend(OptionsOf(config));
  return ResolveSettings(*backend, model, config, MakeDecodePlan(model, config),
                         MeasureWeights(*backend, model, config.dtype, weights))
      .memory;
}

}  // namespace tidal
