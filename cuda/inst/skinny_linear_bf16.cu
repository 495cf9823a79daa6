// The skinny products for __nv_bfloat16.
#include "kernels/skinny_launch.cuh"

namespace tidal {

template void RunSkinnyLinear<__nv_bfloat16>(const LinearArgs&, const RmsNormArgs*, int,
                                             cudaStream_t);
template void RunLinearRopeAppend<__nv_bfloat16>(const LinearArgs&, const RmsNormArgs*,
                                                 const RopeAppendKvArgs&, int, cudaStream_t);
template void RunLinearSiluMul<__nv_bfloat16>(const LinearArgs&, const RmsNormArgs*,
                                              const SiluMulArgs&, int, cudaStream_t);

}  // namespace tidal
