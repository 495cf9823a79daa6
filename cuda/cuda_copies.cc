// The copies of the seam on one GPU: through pinned host memory up and down, and on the device.
#include <algorithm>
#include <cstring>

#include "common/check.h"
#include "cuda_backend.h"

namespace tidal {

void* CudaBackend::BeginUpload(void*, int64_t bytes) {
  EnterOutsideStep("upload of weights");
  TIDAL_CHECK(bytes <= kWeightStagingBytes, InvalidArgument, "upload of weights: ", bytes,
              " bytes in one piece; expected at most ", kWeightStagingBytes);
  if (weight_staging_ == nullptr) {
    weight_staging_ =
        std::make_unique<PinnedStaging>(kWeightStagingBytes, stream(), "staging of weights");
  }
  return weight_staging_->Take(bytes);
}

void CudaBackend::CommitUpload(void* dst, int64_t bytes) {
  EnterOutsideStep("upload of weights");
  TIDAL_CHECK(weight_staging_ != nullptr && bytes <= weight_staging_->last_bytes(), InvalidArgument,
              "upload of weights: a commit of ", bytes, " bytes without a BeginUpload of as many");
  TIDAL_CUDA_CHECK(cudaMemcpyAsync(dst, weight_staging_->last(), static_cast<size_t>(bytes),
                                   cudaMemcpyHostToDevice, stream()));
}

void CudaBackend::Upload(const TensorView& dst, const void* host) {
  EnterOutsideStep("upload");
  int64_t total = dst.bytes();
  for (int64_t done = 0; done < total;) {
    int64_t piece = std::min(total - done, input_staging_->half_bytes());
    void* pinned = input_staging_->Take(piece);
    std::memcpy(pinned, static_cast<const char*>(host) + done, static_cast<size_t>(piece));
    TIDAL_CUDA_CHECK(cudaMemcpyAsync(static_cast<char*>(dst.ptr) + done, pinned,
                                     static_cast<size_t>(piece), cudaMemcpyHostToDevice, stream()));
    done += piece;
  }
}

void CudaBackend::Download(void* host, const TensorView& src) {
  EnterOutsideStep("download");
  int64_t total = src.bytes();
  for (int64_t done = 0; done < total;) {
    int64_t piece = std::min(total - done, download_.bytes());
    TIDAL_CUDA_CHECK(cudaMemcpyAsync(download_.data(), static_cast<const char*>(src.ptr) + done,
                                     static_cast<size_t>(piece), cudaMemcpyDeviceToHost, stream()));
    TIDAL_CUDA_CHECK(cudaStreamSynchronize(stream()));
    std::memcpy(static_cast<char*>(host) + done, download_.data(), static_cast<size_t>(piece));
    done += piece;
  }
  weight_staging_.reset();  // results are asked for: the loading is over
}

void CudaBackend::Copy(const TensorView& dst, const TensorView& src) {
  EnterOutsideStep("copy");
  TIDAL_CUDA_CHECK(cudaMemcpyAsync(dst.ptr, src.ptr, static_cast<size_t>(dst.bytes()),
                                   cudaMemcpyDeviceToDevice, stream()));
}

}  // namespace tidal
