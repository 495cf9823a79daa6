// CudnnAttention of a build without cuDNN's headers: it is never there.
#include "cudnn_attention.h"

namespace tidal {

struct CudnnAttention::Library {};
struct CudnnAttention::Plan {};

CudnnAttention::CudnnAttention(int device, cudaStream_t stream)
    : device_(device), stream_(stream), problem_(LibraryProblem()) {}

CudnnAttention::~CudnnAttention() = default;

std::string CudnnAttention::LibraryVersion() {
  return "";
}

std::string CudnnAttention::LibraryProblem() {
  return "built without cuDNN's headers, see TIDAL_CUDNN";
}

void CudnnAttention::Prepare(const CudnnAttentionShape&) {}

bool CudnnAttention::Run(const AttentionPrefillArgs&) {
  return false;
}

}  // namespace tidal
