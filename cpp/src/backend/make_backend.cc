// Chooses the backend of a device. The CUDA backend is a shared library of its own, opened only
// when a GPU is asked for: without a driver, a GPU or cuBLAS the rest of the engine works all the
// same.
#include <dlfcn.h>

#include <string>

#include "backend/backend.h"
#include "backend/cpu/cpu_info.h"
#include "core/process.h"
#include "tidal/device.h"
#include "tidal/error.h"

namespace tidal {
namespace {

#ifdef TIDAL_WITH_CUDA
constexpr bool kBuiltWithCuda = true;
#else
constexpr bool kBuiltWithCuda = false;
#endif

struct CudaLibrary {
  void* handle = nullptr;
  std::string problem;  // why it could not be opened
};

// libtidal_cuda.so lies beside the binary that holds this function.
std::string CudaLibraryPath() {
  Dl_info self;
  if (dladdr(reinterpret_cast<void*>(&CudaLibraryPath), &self) == 0) return "libtidal_cuda.so";
  std::string path = self.dli_fname;
  size_t slash = path.rfind('/');
  return (slash == std::string::npos ? "." : path.substr(0, slash)) + "/libtidal_cuda.so";
}

const CudaLibrary& OpenCudaLibrary() {
  static const CudaLibrary library = [] {
    CudaLibrary opened;
    if (!kBuiltWithCuda) {
      opened.problem =
          "this build has no CUDA backend; install the CUDA toolkit (nvcc) and rebuild "
          "with TIDAL_CUDA=ON to see what is missing";
      return opened;
    }
    opened.handle = dlopen(CudaLibraryPath().c_str(), RTLD_NOW | RTLD_LOCAL);
    if (opened.handle == nullptr) {
      opened.problem = dlerror();
      if (opened.problem.find("cublas") != std::string::npos) {
        opened.problem += "; pip install 'nvidia-cublas>=13,<14'";
      }
    }
    return opened;
  }();
  return library;
}

template <typename Function>
Function FindSymbol(const char* name) {
  void* symbol = dlsym(OpenCudaLibrary().handle, name);
  TIDAL_CHECK(symbol != nullptr, BackendError, "libtidal_cuda.so: no symbol ", name,
              "; it belongs to another version, reinstall the package");
  return reinterpret_cast<Function>(symbol);
}

// The process that first called the CUDA library: the driver does not work in a child forked since.
const ProcessMark& CudaProcess() {
  static const ProcessMark process;
  return process;
}

std::string DeviceName(const Device& device) {
  return device.type == DeviceType::kCpu ? "cpu" : Concat("cuda:", device.index);
}

}  // namespace

std::unique_ptr<Backend> MakeBackend(const BackendOptions& options) {
  if (options.device.type == DeviceType::kCpu) return MakeCpuBackend(options);
  for (const DeviceStatus& status : ListDevices()) {
    if (status.name == DeviceName(options.device) && status.available) {
      auto make = FindSymbol<MakeCudaBackendFn>(kMakeCudaBackendSymbol);
      return std::unique_ptr<Backend>(make(options));
    }
  }
  std::string reason;
  for (const DeviceStatus& status : ListDevices()) {
    if (!status.available) reason = status.reason;
  }
  throw BackendError(Concat(DeviceName(options.device), ": ",
                            reason.empty() ? "there is no GPU of this number" : reason,
                            "; use device=\"cpu\", or see `tidaldecode info`"));
}

std::vector<DeviceStatus> ListDevices() {
  std::vector<DeviceStatus> devices = {CpuStatus()};
  if (OpenCudaLibrary().handle == nullptr) {
    devices.push_back(
        {.name = "cuda", .hardware = "", .available = false, .reason = OpenCudaLibrary().problem});
    return devices;
  }
  if (CudaProcess().IsForeign()) {
    devices.push_back({.name = "cuda",
                       .hardware = "",
                       .available = false,
                       .reason = "this process was forked from one that had used the GPU; start "
                                 "processes with the method \"spawn\""});
    return devices;
  }
  std::vector<std::pair<std::string, std::string>> libraries;
  FindSymbol<ListCudaDevicesFn>(kListCudaDevicesSymbol)(devices, libraries);
  return devices;
}

std::vector<std::pair<std::string, std::string>> ListLibraries() {
  std::vector<std::pair<std::string, std::string>> libraries = {{"OpenBLAS", BlasDescription()}};
  if (OpenCudaLibrary().handle != nullptr && !CudaProcess().IsForeign()) {
    std::vector<DeviceStatus> devices;
    FindSymbol<ListCudaDevicesFn>(kListCudaDevicesSymbol)(devices, libraries);
  }
  return libraries;
}

const char* VersionString() {
  return TIDAL_VERSION;
}

}  // namespace tidal
