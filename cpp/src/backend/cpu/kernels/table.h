// Fills the kernel table from this translation unit's instantiations. Included last by
// kernels_*.cc.
#pragma once

#include "backend/cpu/kernels/attend.h"
#include "backend/cpu/kernels/kernels.h"
#include "backend/cpu/kernels/linear.h"
#include "backend/cpu/kernels/rows.h"
#include "backend/cpu/kernels/shadow.h"
#include "backend/cpu/kernels/weight_rows.h"

namespace tidal::TIDAL_CPU_ISA {

inline constexpr CpuKernels kTable = {
    .name = TIDAL_CPU_ISA_NAME,
    .linear = {Linear<Numbers<float>>, Linear<Numbers<BFloat16>>, Linear<Numbers<Float16>>,
               Linear<Float8Codes>, Linear<Int4Codes>, Linear<Mxfp4Codes>},
    .decode = {Decode<Numbers<float>>, Decode<Numbers<BFloat16>>, Decode<Numbers<Float16>>,
               Decode<Float8Codes>, Decode<Int4Codes>, Decode<Mxfp4Codes>},
    .attend_span = {Attend<float>, Attend<BFloat16>, Attend<Float16>, Attend<int8_t>,
                    Attend<Float8>},
    .merge_spans = Merge,
    .softmax_row = Softmax,
    .rank_keys = Rank,
    .score_shadow = ScoreShadow,
    .widen = {Widen<float>, Widen<BFloat16>, Widen<Float16>, Widen<int8_t>, Widen<Float8>},
    .rms_norm = {RmsNorm<float>, RmsNorm<BFloat16>, RmsNorm<Float16>},
    .rotate_half = RotateHalf,
    .gate_mul = {SiluMul, GeluTanhMul, ClampedSwiglu},
    .scale = Scale,
    .softcap = CapInPlace,
};

}  // namespace tidal::TIDAL_CPU_ISA
