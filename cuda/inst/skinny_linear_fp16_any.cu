// The skinny products for __half and any number of tokens.
#include "kernels/skinny_launch.cuh"

namespace tidal {

template void RunSkinnyLinear<__half, kAnyWidth>(const LinearArgs&, const SkinnyRun&);
template void RunLinearRopeAppend<__half, kAnyWidth>(const LinearArgs&, const RopeAppendKvArgs&,
                                                     const SkinnyRun&);
template void RunLinearSiluMul<__half, kAnyWidth>(const LinearArgs&, const SiluMulArgs&,
                                                  const SkinnyRun&);

}  // namespace tidal
