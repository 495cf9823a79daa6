// Binds the letters of an op's shapes to sizes, tensor by tensor; the first tensor that disagrees
// is reported.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "backend/op_args.h"
#include "tidal/error.h"

namespace tidal {

// A letter of a shape and the size it stands for: given, or bound by the first tensor that has it.
struct Dim {
  const char* name;
  int64_t size = -1;
};

constexpr uint32_t Bit(DType dtype) {
  return 1u << static_cast<uint32_t>(dtype);
}

// A role of elements and the dtypes it may still have: the first tensor in the role decides.
struct Kind {
  const char* name;
  uint32_t dtypes;
};

inline constexpr uint32_t kFloats =
    Bit(DType::kFloat32) | Bit(DType::kBFloat16) | Bit(DType::kFloat16);

inline std::string DTypeList(uint32_t dtypes) {
  std::string list;
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kInt32,
                      DType::kUInt8, DType::kInt8, DType::kFloat8}) {
    if ((dtypes & Bit(dtype)) == 0) continue;
    if (!list.empty()) list += " or ";
    list += DTypeName(dtype);
  }
  return list;
}

inline std::string GotShape(const TensorView& view) {
  std::string text = "[";
  for (int axis = 0; axis < view.rank; ++axis) {
    if (axis > 0) text += ", ";
    text += std::to_string(view.dim(axis));
  }
  return text + "]";
}

inline std::string WantedShape(std::initializer_list<Dim*> dims) {
  std::string text = "[";
  for (const Dim* dim : dims) {
    if (text.size() > 1) text += ", ";
    text += dim->name;
    if (dim->size >= 0) text += " = " + std::to_string(dim->size);
  }
  return text + "]";
}

class OpCheck {
 public:
  explicit OpCheck(const char* op, std::optional<DType> act = std::nullopt) : op_(op) {
    if (act) act_.dtypes = Bit(*act);
  }

  void Tensor(const char* name, const TensorView& view, std::initializer_list<Dim*> dims,
              Kind& kind) {
    bool same = view.rank == static_cast<int>(dims.size());
    int axis = 0;
    for (Dim* dim : dims) {
      if (!same) break;
      const int64_t size = view.dim(axis++);
      same = size >= 0 && (dim->size < 0 || dim->size == size);
      if (same) dim->size = size;
    }
    TIDAL_CHECK(same, InvalidArgument, op_, ": ", name, ": got shape ", GotShape(view),
                ", expected ", WantedShape(dims));
    TIDAL_CHECK((kind.dtypes & Bit(view.dtype)) != 0, InvalidArgument, op_, ": ", name, ": got ",
                DTypeName(view.dtype), ", expected ", DTypeList(kind.dtypes), " (", kind.name, ")");
    kind.dtypes = Bit(view.dtype);
    TIDAL_CHECK(view.ptr != nullptr || view.numel() == 0, InvalidArgument, op_, ": ", name,
                ": got no memory, expected ", GotShape(view), " ", DTypeName(view.dtype));
  }

  void Optional(const char* name, const TensorView& view, std::initializer_list<Dim*> dims,
                Kind& kind) {
    if (view) Tensor(name, view, dims, kind);
  }

  void Matrix(const char* name, const Weight& weight, Dim& out_features, Dim& in_features) {
    if (!weight.is_coded()) {
      Tensor(name, weight.data, {&out_features, &in_features}, weight_);
      return;
    }
    const bool is_bytes = CodeBits(weight.codes) == 8;
    const int64_t inputs = in_features.size, group = weight.group_size;
    Dim codes{is_bytes ? "K" : "K / 2", is_bytes ? inputs : inputs / 2};
    Tensor(name, weight.data, {&out_features, &codes}, uint8_);
    TIDAL_CHECK(weight.num_inputs() == inputs && group >= 1 && group <= inputs, InvalidArgument,
                op_, ": ", name, ": got ", weight.num_inputs(), " inputs in groups of ", group,
                ", expected K = ", inputs, " in groups of 1 to K");
    Dim groups{"K / group_size", (inputs + group - 1) / group};
    const bool is_mxfp4 = weight.codes == WeightCodes::kMxfp4;
    Kind scale{"scale", is_mxfp4 ? Bit(DType::kUInt8) : kFloats};
    Tensor("weight.scales", weight.scales, {&groups, &out_features}, scale);
    Optional("weight.zeros", weight.zeros, {&groups, &out_features}, uint8_);
  }

  void Cache(const PagedKv& kv, Dim& batch, Dim& num_kv_heads, Dim& head_dim) {
    Dim num_pages{"num_pages"}, page_size{"page_size"}, max_pages{"max_pages"};
    Tensor("k_pages", kv.k_pages, {&num_pages, &num_kv_heads, &page_size, &head_dim}, kv_);
    Tensor("v_pages", kv.v_pages, {&num_pages, &num_kv_heads, &page_size, &head_dim}, kv_);
    if (kv.k_pages.dtype == DType::kInt8) {
      Tensor("k_scales", kv.k_scales, {&num_pages, &num_kv_heads, &page_size}, float32_);
      Tensor("v_scales", kv.v_scales, {&num_pages, &num_kv_heads, &page_size}, float32_);
    }
    Scale("k_scale", kv.k_scale, kv.k_pages.dtype);
    Scale("v_scale", kv.v_scale, kv.k_pages.dtype);
    Tensor("page_table", kv.page_table, {&batch, &max_pages}, int32_);
    Tensor("seq_lens", kv.seq_lens, {&batch}, int32_);
    TIDAL_CHECK(page_size.size >= 1, InvalidArgument, op_,
                ": k_pages: got page_size 0, expected at least 1");
  }

  void Scale(const char* name, float scale, DType pages) {
    const bool is_valid =
        pages == DType::kFloat8 ? std::isfinite(scale) && scale > 0.0f : scale == 1.0f;
    TIDAL_CHECK(is_valid, InvalidArgument, op_, ": ", name, ": got ", scale, ", expected ",
                pages == DType::kFloat8 ? "a finite number > 0" : "1 of pages other than fp8");
  }

  void Shadow(const ShadowKeys& shadow, const PagedKv& kv) {
    Dim num_pages{"num_pages", kv.k_pages.dim(0)}, num_kv_heads{"Hkv", kv.k_pages.dim(1)};
    Dim page_size{"page_size", kv.k_pages.dim(2)}, head_dim{"D", kv.k_pages.dim(3)};
    Dim half{"D / 2", head_dim.size / 2};
    Tensor("codes", shadow.codes, {&num_pages, &num_kv_heads, &page_size, &half}, uint8_);
    Tensor("scales", shadow.scales, {&num_pages, &num_kv_heads, &page_size}, float16_);
    Tensor("balance", shadow.balance, {&num_kv_heads, &head_dim}, float32_);
    TIDAL_CHECK(head_dim.size % 2 == 0, InvalidArgument, op_, ": k_pages: got D = ", head_dim.size,
                ", expected an even head_dim for codes of 4 bits");
  }

  void Groups(const Dim& num_q_heads, const Dim& num_kv_heads) {
    TIDAL_CHECK(num_kv_heads.size >= 1 && num_q_heads.size % num_kv_heads.size == 0,
                InvalidArgument, op_, ": got Hq = ", num_q_heads.size,
                ", Hkv = ", num_kv_heads.size, ", expected a multiple of Hkv query heads");
  }

  void Rule(const AttentionRule& rule, Dim& num_q_heads) {
    Optional("sinks", rule.sinks, {&num_q_heads}, float32_);
    TIDAL_CHECK(rule.window >= 0, InvalidArgument, op_, ": window: got ", rule.window,
                ", expected 0 or more");
    TIDAL_CHECK(std::isfinite(rule.softcap) && rule.softcap >= 0.0f, InvalidArgument, op_,
                ": softcap: got ", rule.softcap, ", expected 0 or more");
  }

  void NoWindow(const AttentionRule& rule) {
    TIDAL_CHECK(rule.window == 0, InvalidArgument, op_, ": window: got ", rule.window,
                ", expected 0: what is chosen from is all of the context");
  }

  void HeadNorm(const char* name, const TensorView& norm, const Dim& num_heads, Dim& head_dim) {
    Dim all{"all heads' D", num_heads.size * head_dim.size};
    const bool is_wide = norm && norm.rank == 1 && norm.dim(0) != head_dim.size;
    Optional(name, norm, {is_wide ? &all : &head_dim}, norm_);
  }

  const char* name() const { return op_; }
  Kind& norm() { return norm_; }
  Kind& act() { return act_; }
  Kind& weight() { return weight_; }
  Kind& float32() { return float32_; }
  Kind& scores() { return scores_; }
  Kind& int32() { return int32_; }
  Kind& uint8() { return uint8_; }

 private:
  const char* op_;
  Kind act_{"act", kFloats};
  Kind weight_{"weight", kFloats};
  Kind norm_{"weight or float32", kFloats};
  Kind kv_{"kv", kFloats | Bit(DType::kInt8) | Bit(DType::kFloat8)};
  Kind float32_{"float32", Bit(DType::kFloat32)};
  Kind scores_{"scores", Bit(DType::kFloat32) | Bit(DType::kFloat16)};
  Kind int32_{"int32", Bit(DType::kInt32)};
  Kind uint8_{"uint8", Bit(DType::kUInt8)};
  Kind float16_{"float16", Bit(DType::kFloat16)};
};

}  // namespace tidal
