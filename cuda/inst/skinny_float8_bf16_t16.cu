// The skinny products for __nv_bfloat16 and up to 16 tokens beside 8-bit weights.
#include "kernels/skinny_launch.cuh"

namespace tidal {

template void RunSkinnyLinear<__nv_bfloat16, 16, WeightKind::kFloat8>(const LinearArgs&,
                                                                      const SkinnyRun&);
template void RunLinearRopeAppend<__nv_bfloat16, 16, WeightKind::kFloat8>(const LinearArgs&,
                                                                          const RopeAppendKvArgs&,
                                                                          const SkinnyRun&);
template void RunLinearSiluMul<__nv_bfloat16, 16, WeightKind::kFloat8>(const LinearArgs&,
                                                                       const SiluMulArgs&,
                                                                       const SkinnyRun&);

}  // namespace tidal
