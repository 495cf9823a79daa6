// The skinny products for __half and up to 16 tokens.
#include "kernels/skinny_launch.cuh"

namespace tidal {

template void RunSkinnyLinear<__half, 16, WeightKind::kHalf>(const LinearArgs&, const SkinnyRun&);
template void RunLinearRopeAppend<__half, 16, WeightKind::kHalf>(const LinearArgs&,
                                                                 const RopeAppendKvArgs&,
                                                                 const SkinnyRun&);
template void RunLinearSiluMul<__half, 16, WeightKind::kHalf>(const LinearArgs&, const SiluMulArgs&,
                                                              const SkinnyRun&);

}  // namespace tidal
