// The skinny products for __half.
#include "kernels/skinny_launch.cuh"

namespace tidal {

template void RunSkinnyLinear<__half>(const LinearArgs&, const RmsNormArgs*, int, cudaStream_t);
template void RunQkvRopeAppend<__half>(const QkvRopeAppendArgs&, int, cudaStream_t);
template void RunGateUpSiluMul<__half>(const GateUpSiluMulArgs&, int, cudaStream_t);

}  // namespace tidal
