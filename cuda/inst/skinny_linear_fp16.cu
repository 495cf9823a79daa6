// The skinny products for __half.
#include "kernels/skinny_launch.cuh"

namespace tidal {

template void RunSkinnyLinear<__half>(const LinearArgs&, const RmsNormArgs*, int, cudaStream_t);
template void RunLinearRopeAppend<__half>(const LinearArgs&, const RmsNormArgs*,
                                          const RopeAppendKvArgs&, int, cudaStream_t);
template void RunLinearSiluMul<__half>(const LinearArgs&, const RmsNormArgs*, const SiluMulArgs&,
                                       int, cudaStream_t);

}  // namespace tidal
