// The skinny products for __half.
#include "kernels/skinny_launch.cuh"

namespace tidal {

template void RunSkinnyLinear<__half>(const LinearArgs&, int, cudaStream_t);
template void RunLinearRopeAppend<__half>(const LinearArgs&, const RopeAppendKvArgs&, int,
                                          cudaStream_t);
template void RunLinearSiluMul<__half>(const LinearArgs&, const SiluMulArgs&, int, cudaStream_t);

}  // namespace tidal
