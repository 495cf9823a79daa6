// The skinny products for __nv_bfloat16 and up to 16 tokens.
#include "kernels/skinny_launch.cuh"

namespace tidal {

template void RunSkinnyLinear<__nv_bfloat16, 16, WeightKind::kHalf>(const LinearArgs&,
                                                                    const SkinnyRun&);
template void RunLinearRopeAppend<__nv_bfloat16, 16, WeightKind::kHalf>(const LinearArgs&,
                                                                        const RopeAppendKvArgs&,
                                                                        const SkinnyRun&);
template void RunLinearSiluMul<__nv_bfloat16, 16, WeightKind::kHalf>(const LinearArgs&,
                                                                     const SiluMulArgs&,
                                                                     const SkinnyRun&);

}  // namespace tidal
