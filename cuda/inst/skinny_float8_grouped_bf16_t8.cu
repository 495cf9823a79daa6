// The skinny products for __nv_bfloat16 and up to 8 tokens beside 8-bit weights with scales of
// groups.
#include "kernels/skinny_launch.cuh"

namespace tidal {

template void RunSkinnyLinear<__nv_bfloat16, 8, WeightKind::kFloat8Grouped>(const LinearArgs&,
                                                                            const SkinnyRun&);
template void RunLinearRopeAppend<__nv_bfloat16, 8, WeightKind::kFloat8Grouped>(
    const LinearArgs&, const RopeAppendKvArgs&, const SkinnyRun&);
template void RunLinearSiluMul<__nv_bfloat16, 8, WeightKind::kFloat8Grouped>(const LinearArgs&,
                                                                             const SiluMulArgs&,
                                                                             const SkinnyRun&);

}  // namespace tidal
