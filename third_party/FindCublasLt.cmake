# Finds cuBLASLt, NVIDIA's matrix library: in the CUDA toolkit, else in the building Python's wheel
# `nvidia-cublas` (<site-packages>/nvidia/cu13), else under the folder that CublasLt_ROOT names.
#
# Call after find_package(CUDAToolkit). Sets
#   CublasLt_FOUND
#   CublasLt_LIBRARY      the library file that is linked
#   CublasLt_RUNPATH      where the program must look for it at run time, semicolon-separated
#   CublasLt_REASON       why it was not found, with the remedy
# and the target CublasLt::CublasLt.

set(_cublaslt_major ${CUDAToolkit_VERSION_MAJOR})
# Relative to the installed <site-packages>/tidaldecode/libtidal_cuda.so: works wherever that is.
set(CublasLt_RUNPATH "$ORIGIN/../nvidia/cu${_cublaslt_major}/lib")
set(_cublaslt_roots ${CublasLt_ROOT})

if(TARGET CUDA::cublasLt AND NOT CublasLt_ROOT)
  get_target_property(CublasLt_LIBRARY CUDA::cublasLt IMPORTED_LOCATION)
  get_filename_component(_cublaslt_dir "${CublasLt_LIBRARY}" DIRECTORY)
  list(APPEND CublasLt_RUNPATH "${_cublaslt_dir}")
  set(CublasLt_INCLUDE_DIR "${CUDAToolkit_INCLUDE_DIRS}")
else()
  if(NOT Python_EXECUTABLE)
    find_package(Python COMPONENTS Interpreter QUIET)
  endif()
  if(Python_EXECUTABLE)
    # "nvidia" is a namespace package: several folders may hold parts of it.
    set(_cublaslt_query
        "import importlib.util as u\ns = u.find_spec('nvidia')\n\
print(*(s.submodule_search_locations if s else []), sep=';')")
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c "${_cublaslt_query}"
      OUTPUT_VARIABLE _cublaslt_packages
      OUTPUT_STRIP_TRAILING_WHITESPACE
      ERROR_QUIET)
    foreach(_cublaslt_package IN LISTS _cublaslt_packages)
      list(APPEND _cublaslt_roots "${_cublaslt_package}/cu${_cublaslt_major}")
    endforeach()
  endif()
  # The wheel has no unversioned libcublasLt.so. Never cached: the folder of an isolated build is
  # gone by the next one.
  set(CublasLt_LIBRARY "")
  set(CublasLt_INCLUDE_DIR "")
  foreach(_cublaslt_root IN LISTS _cublaslt_roots)
    set(_cublaslt_file "${_cublaslt_root}/lib/libcublasLt.so.${_cublaslt_major}")
    if(NOT CublasLt_LIBRARY AND EXISTS "${_cublaslt_file}"
       AND EXISTS "${_cublaslt_root}/include/cublasLt.h")
      set(CublasLt_LIBRARY "${_cublaslt_file}")
      set(CublasLt_INCLUDE_DIR "${_cublaslt_root}/include")
    endif()
  endforeach()
endif()

math(EXPR _cublaslt_next "${_cublaslt_major} + 1")
set(CublasLt_REASON
    "cuBLASLt is neither in the CUDA toolkit (${CUDAToolkit_LIBRARY_DIR}) nor in the Python of this \
build (${Python_EXECUTABLE}). Run: \
pip install 'nvidia-cublas>=${_cublaslt_major}.0,<${_cublaslt_next}'")

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  CublasLt
  REQUIRED_VARS CublasLt_LIBRARY CublasLt_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "${CublasLt_REASON}")

if(CublasLt_FOUND)
  set(CublasLt_REASON "")
  if(NOT TARGET CublasLt::CublasLt)
    add_library(CublasLt::CublasLt SHARED IMPORTED)
    set_target_properties(
      CublasLt::CublasLt PROPERTIES IMPORTED_LOCATION "${CublasLt_LIBRARY}"
                                    INTERFACE_INCLUDE_DIRECTORIES "${CublasLt_INCLUDE_DIR}")
  endif()
endif()
