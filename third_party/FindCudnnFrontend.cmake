# Finds the headers of cuDNN and of its C++ frontend. Nothing is linked: the library is opened at
# run time. Looked up under CudnnFrontend_ROOT, in the CUDA toolkit, the system, and the building
# Python's wheels `nvidia-cudnn-frontend` (<site-packages>/include) and `nvidia-cudnn-cu13`
# (<site-packages>/nvidia/cudnn).
#
# Call after find_package(CUDAToolkit). Sets
#   CudnnFrontend_FOUND
#   CudnnFrontend_VERSION    of the frontend
#   CudnnFrontend_RUNPATH    where the program must look for libcudnn.so.9 at run time, ;-separated
#   CudnnFrontend_REASON     why it was not found, with the remedy
# and the target CudnnFrontend::CudnnFrontend.

# Relative to the installed <site-packages>/tidaldecode/libtidal_cuda.so: works wherever that is.
set(CudnnFrontend_RUNPATH "$ORIGIN/../nvidia/cudnn/lib")
set(_cudnn_places)
foreach(_cudnn_root IN LISTS CudnnFrontend_ROOT)
  list(APPEND _cudnn_places "${_cudnn_root}/include")
endforeach()
list(APPEND _cudnn_places ${CUDAToolkit_INCLUDE_DIRS} /usr/include
     /usr/include/${CMAKE_LIBRARY_ARCHITECTURE})
if(NOT Python_EXECUTABLE)
  find_package(Python COMPONENTS Interpreter QUIET)
endif()
if(Python_EXECUTABLE)
  set(_cudnn_query
      "import importlib.util as u, sysconfig\ns = u.find_spec('nvidia')\n\
print(*(p + '/cudnn' for p in (s.submodule_search_locations if s else [])), \
sysconfig.get_path('purelib'), sep=';')")
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "${_cudnn_query}"
    OUTPUT_VARIABLE _cudnn_packages
    OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_QUIET)
  foreach(_cudnn_package IN LISTS _cudnn_packages)
    list(APPEND _cudnn_places "${_cudnn_package}/include")
    if(EXISTS "${_cudnn_package}/lib/libcudnn.so.9")
      list(APPEND CudnnFrontend_RUNPATH "${_cudnn_package}/lib")
    endif()
  endforeach()
endif()

# Never cached: the folder of an isolated build is gone by the next one.
set(_cudnn_include "")
set(_cudnn_frontend_include "")
foreach(_cudnn_place IN LISTS _cudnn_places)
  if(NOT _cudnn_include AND EXISTS "${_cudnn_place}/cudnn.h")
    set(_cudnn_include "${_cudnn_place}")
  endif()
  if(NOT _cudnn_frontend_include AND EXISTS "${_cudnn_place}/cudnn_frontend_version.h")
    set(_cudnn_frontend_include "${_cudnn_place}")
  endif()
endforeach()

set(CudnnFrontend_VERSION "")
if(_cudnn_frontend_include)
  file(STRINGS "${_cudnn_frontend_include}/cudnn_frontend_version.h" _cudnn_lines
       REGEX "define CUDNN_FRONTEND_(MAJOR|MINOR|PATCH)_VERSION")
  string(REGEX MATCHALL "[0-9]+" _cudnn_numbers "${_cudnn_lines}")
  string(REPLACE ";" "." CudnnFrontend_VERSION "${_cudnn_numbers}")
endif()

set(_cudnn_remedy "Run: tools/ensure_cudnn.py DIR, and give CudnnFrontend_ROOT=DIR")
set(CudnnFrontend_REASON "")
if(NOT _cudnn_include)
  set(CudnnFrontend_REASON "cudnn.h was not found. ${_cudnn_remedy}")
elseif(NOT _cudnn_frontend_include)
  set(CudnnFrontend_REASON "cudnn_frontend.h was not found. ${_cudnn_remedy}")
elseif(CudnnFrontend_VERSION VERSION_LESS 1.32)
  set(CudnnFrontend_REASON
      "cuDNN's frontend in ${_cudnn_frontend_include} is ${CudnnFrontend_VERSION}, older than \
1.32. ${_cudnn_remedy}")
  set(_cudnn_frontend_include "")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  CudnnFrontend
  REQUIRED_VARS _cudnn_include _cudnn_frontend_include
  VERSION_VAR CudnnFrontend_VERSION
  REASON_FAILURE_MESSAGE "${CudnnFrontend_REASON}")

if(CudnnFrontend_FOUND AND NOT TARGET CudnnFrontend::CudnnFrontend)
  add_library(CudnnFrontend::CudnnFrontend INTERFACE IMPORTED)
  set(_cudnn_includes "${_cudnn_frontend_include}" "${_cudnn_include}")
  # The frontend includes nvrtc.h for what we do not use of it.
  find_path(CudnnFrontend_NVRTC nvrtc.h PATHS ${CUDAToolkit_INCLUDE_DIRS} NO_DEFAULT_PATH)
  mark_as_advanced(CudnnFrontend_NVRTC)
  if(NOT CudnnFrontend_NVRTC)
    list(APPEND _cudnn_includes "${PROJECT_SOURCE_DIR}/cuda/nvrtc_stub")
  endif()
  set_target_properties(
    CudnnFrontend::CudnnFrontend
    PROPERTIES
      INTERFACE_INCLUDE_DIRECTORIES "${_cudnn_includes}"
      INTERFACE_COMPILE_DEFINITIONS
        "NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING;CUDNN_FRONTEND_SKIP_JSON_LIB;NV_CUDNN_FRONTEND_DISABLE_LOGGING")
endif()
