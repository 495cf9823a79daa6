// The skinny products for __half and up to 16 tokens beside 8-bit weights.
#include "kernels/skinny_launch.cuh"

namespace tidal {

template void RunSkinnyLinear<__half, 16, WeightKind::kFloat8>(const LinearArgs&, const SkinnyRun&);
template void RunLinearRopeAppend<__half, 16, WeightKind::kFloat8>(const LinearArgs&,
                                                                   const RopeAppendKvArgs&,
                                                                   const SkinnyRun&);
template void RunLinearSiluMul<__half, 16, WeightKind::kFloat8>(const LinearArgs&,
                                                                const SiluMulArgs&,
                                                                const SkinnyRun&);

}  // namespace tidal
