// The skinny products for __nv_bfloat16.
#include "kernels/skinny_launch.cuh"

namespace tidal {

template void RunSkinnyLinear<__nv_bfloat16>(const LinearArgs&, const RmsNormArgs*, int,
                                             cudaStream_t);
template void RunQkvRopeAppend<__nv_bfloat16>(const QkvRopeAppendArgs&, int, cudaStream_t);
template void RunGateUpSiluMul<__nv_bfloat16>(const GateUpSiluMulArgs&, int, cudaStream_t);

}  // namespace tidal
