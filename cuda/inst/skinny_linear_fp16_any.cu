// The skinny products for __half and any number of tokens.
#include "kernels/skinny_launch.cuh"

namespace tidal {

template void RunSkinnyLinear<__half, kAnyWidth, WeightKind::kHalf>(const LinearArgs&,
                                                                    const SkinnyRun&);
template void RunLinearRopeAppend<__half, kAnyWidth, WeightKind::kHalf>(const LinearArgs&,
                                                                        const RopeAppendKvArgs&,
                                                                        const SkinnyRun&);
template void RunLinearSiluMul<__half, kAnyWidth, WeightKind::kHalf>(const LinearArgs&,
                                                                     const SiluMulArgs&,
                                                                     const SkinnyRun&);

}  // namespace tidal
