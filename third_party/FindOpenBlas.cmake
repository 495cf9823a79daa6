# OpenBLAS with its CBLAS interface: the wheel scipy-openblas32 of the building Python, else the
# system's.
#
# Sets OpenBlas_FOUND, OpenBlas_VERSION, OpenBlas_SOURCE ("scipy-openblas32" or "system") and
# OpenBlas_RUNTIME_DIR (where its shared library lies); defines the imported target Tidal::openblas.
# The wheel prefixes every symbol: the target then defines TIDAL_BLAS_PREFIX=scipy_.
#
# Reads Python_EXECUTABLE or Python3_EXECUTABLE if the project has looked for Python before.
include(FindPackageHandleStandardArgs)

set(_openblas_python "${Python_EXECUTABLE}")
if(NOT _openblas_python)
  set(_openblas_python "${Python3_EXECUTABLE}")
endif()
if(NOT _openblas_python)
  find_program(_openblas_python_program NAMES python3 python)
  set(_openblas_python "${_openblas_python_program}")
endif()

set(OpenBlas_INCLUDE_DIR "")
set(OpenBlas_LIBRARY "")
set(OpenBlas_VERSION "")
set(_openblas_prefix "")

if(_openblas_python)
  execute_process(
    COMMAND "${_openblas_python}" -c
      "import scipy_openblas32 as s; print(s.get_include_dir(), s.get_lib_dir(), s.get_library(), \
s.__version__, sep=';', end='')"
    OUTPUT_VARIABLE _openblas_wheel
    RESULT_VARIABLE _openblas_status
    ERROR_QUIET)
  if(_openblas_status EQUAL 0)
    list(GET _openblas_wheel 0 OpenBlas_INCLUDE_DIR)
    list(GET _openblas_wheel 1 _openblas_lib_dir)
    list(GET _openblas_wheel 2 _openblas_name)
    list(GET _openblas_wheel 3 OpenBlas_VERSION)
    find_library(_openblas_wheel_library NAMES "${_openblas_name}" PATHS "${_openblas_lib_dir}"
      NO_DEFAULT_PATH NO_CACHE)
    set(OpenBlas_LIBRARY "${_openblas_wheel_library}")
    set(OpenBlas_SOURCE "scipy-openblas32")
    set(_openblas_prefix "scipy_")
  endif()
endif()

if(NOT OpenBlas_LIBRARY)
  set(OpenBlas_SOURCE "system")
  set(_openblas_prefix "")
  # Plain openblas holds CBLAS everywhere but on distributions that split it off.
  find_library(_openblas_system_library NAMES openblas openblasp openblas64 NO_CACHE
    PATH_SUFFIXES openblas-pthread openblas)
  find_path(_openblas_system_include NAMES cblas.h NO_CACHE
    PATH_SUFFIXES openblas openblas-pthread x86_64-linux-gnu/openblas-pthread)
  set(OpenBlas_LIBRARY "${_openblas_system_library}")
  set(OpenBlas_INCLUDE_DIR "${_openblas_system_include}")
  if(EXISTS "${OpenBlas_INCLUDE_DIR}/openblas_config.h")
    file(STRINGS "${OpenBlas_INCLUDE_DIR}/openblas_config.h" _openblas_line
      REGEX "OPENBLAS_VERSION \" OpenBLAS ")
    string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" OpenBlas_VERSION "${_openblas_line}")
  endif()
endif()

find_package_handle_standard_args(OpenBlas
  REQUIRED_VARS OpenBlas_LIBRARY OpenBlas_INCLUDE_DIR
  VERSION_VAR OpenBlas_VERSION
  REASON_FAILURE_MESSAGE
    "OpenBLAS was not found: pip install scipy-openblas32 (into the Python that builds), or install \
the system's OpenBLAS development package")

get_filename_component(OpenBlas_RUNTIME_DIR "${OpenBlas_LIBRARY}" DIRECTORY)

if(OpenBlas_FOUND AND NOT TARGET Tidal::openblas)
  add_library(Tidal::openblas UNKNOWN IMPORTED)
  set_target_properties(Tidal::openblas PROPERTIES
    IMPORTED_LOCATION "${OpenBlas_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${OpenBlas_INCLUDE_DIR}")
  if(_openblas_prefix)
    set_target_properties(Tidal::openblas PROPERTIES
      INTERFACE_COMPILE_DEFINITIONS "TIDAL_BLAS_PREFIX=${_openblas_prefix}")
  endif()
endif()
