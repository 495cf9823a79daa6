// The entry points of libtidal_cuda.so, found by name (backend/backend.h), and the list of GPUs.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <string>
#include <utility>
#include <vector>

#include "cuda_backend.h"
#include "cuda_linear.h"
#include "kernels/attention_prefill_hopper.h"
#include "tidal/error.h"

namespace tidal {
namespace {

std::string VersionText(int version) {  // 13000 -> "13.0"
  return Concat(version / 1000, ".", version % 1000 / 10);
}

// NVIDIA's management library, for free memory: asking the runtime would make a context of several
// hundred MiB on each GPU. It comes with the driver and is opened at run time; null functions if it
// cannot be.
class ManagementLibrary {
 public:
  ManagementLibrary() : handle_(dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) return;
    auto init = Symbol<int (*)()>("nvmlInit_v2");
    started_ = init != nullptr && init() == 0;
    find_ = Symbol<int (*)(const char*, void**)>("nvmlDeviceGetHandleByPciBusId_v2");
    memory_ = Symbol<int (*)(void*, Memory*)>("nvmlDeviceGetMemoryInfo");
  }
  ~ManagementLibrary() {
    if (auto shutdown = Symbol<int (*)()>("nvmlShutdown"); started_ && shutdown != nullptr)
      shutdown();
    if (handle_ != nullptr) dlclose(handle_);
  }
  ManagementLibrary(const ManagementLibrary&) = delete;
  ManagementLibrary& operator=(const ManagementLibrary&) = delete;

  // 0 if unknown.
  int64_t FreeBytes(int device) const {
    char bus_id[32] = {};
    void* found = nullptr;
    Memory memory = {};
    if (!started_ || find_ == nullptr || memory_ == nullptr) return 0;
    if (cudaDeviceGetPCIBusId(bus_id, sizeof(bus_id), device) != cudaSuccess) return 0;
    if (find_(bus_id, &found) != 0 || memory_(found, &memory) != 0) return 0;
    return static_cast<int64_t>(memory.free);
  }

 private:
  struct Memory {  // nvmlMemory_t
    unsigned long long total, free, used;
  };

  template <typename Function>
  Function Symbol(const char* name) const {
    return handle_ == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(handle_, name));
  }

  void* handle_;
  bool started_ = false;
  int (*find_)(const char*, void**) = nullptr;
  int (*memory_)(void*, Memory*) = nullptr;
};

// What reads prompts on the first device.
const char* PrefillAttentionText(int num_devices) {
  bool is_hopper = num_devices > 0 && HasAttentionPrefillHopper(0);
  return is_hopper ? "own kernel for compute capability 9.0" : "own kernel";
}

// Why there is no GPU at all, in plain words.
std::string WhyNoDevice(cudaError_t status) {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  std::string detail = cudaGetErrorString(status);
  if (driver == 0) return "no NVIDIA driver found: " + detail;
  if (status == cudaErrorInsufficientDriver) {
    return Concat("the NVIDIA driver is for CUDA ", VersionText(driver), ", this build needs CUDA ",
                  VersionText(runtime), ": ", detail);
  }
  return "no usable GPU: " + detail;
}

DeviceStatus StatusOf(int device, const ManagementLibrary& management) {
  DeviceStatus status;
  status.name = Concat("cuda:", device);
  cudaDeviceProp properties = {};
  if (cudaError_t error = cudaGetDeviceProperties(&properties, device); error != cudaSuccess) {
    cudaGetLastError();
    status.reason = cudaGetErrorString(error);
    return status;
  }
  status.hardware =
      Concat(properties.name, ", compute capability ", properties.major, ".", properties.minor);
  status.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  status.free_bytes = management.FreeBytes(device);
  status.available = properties.major >= kMinComputeCapability;
  if (!status.available) status.reason = "compute capability below 8.0";
  return status;
}

void ListCudaDevices(std::vector<DeviceStatus>& devices,
                     std::vector<std::pair<std::string, std::string>>& libraries) {
  libraries.emplace_back("CUDA runtime", VersionText(CUDART_VERSION));
  libraries.emplace_back("cuBLASLt", CudaLinear::LibraryVersion());
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();
  libraries.emplace_back("prefill attention", PrefillAttentionText(count));
  if (error != cudaSuccess || count == 0) {
    DeviceStatus status;
    status.name = "cuda";
    status.reason = WhyNoDevice(error != cudaSuccess ? error : cudaErrorNoDevice);
    devices.push_back(std::move(status));
    return;
  }
  ManagementLibrary management;
  for (int device = 0; device < count; ++device) devices.push_back(StatusOf(device, management));
}

}  // namespace
}  // namespace tidal

#define TIDAL_EXPORT extern "C" __attribute__((visibility("default")))

TIDAL_EXPORT tidal::Backend* tidal_make_cuda_backend(const tidal::BackendOptions& options) {
  return new tidal::CudaBackend(options);
}

TIDAL_EXPORT void tidal_list_cuda_devices(
    std::vector<tidal::DeviceStatus>& devices,
    std::vector<std::pair<std::string, std::string>>& libraries) {
  tidal::ListCudaDevices(devices, libraries);
}
