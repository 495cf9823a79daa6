// C++ errors become the Python classes of tidaldecode/errors.py of the same name.
#include <new>
#include <stdexcept>

#include "bindings.h"
#include "tidal/error.h"

namespace py = pybind11;

namespace tidal {
namespace {

const OutOfMemoryError kNoHostMemory(
    "host memory: there is none left; end other programs, raise the limit, or ask for less at "
    "once");

void Raise(const char* class_name, const std::exception& error) {
  py::object cls = py::module_::import("tidaldecode.errors").attr(class_name);
  PyErr_SetString(cls.ptr(), error.what());
}

}  // namespace

void RegisterErrors() {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const CapacityError& error) {
      Raise("CapacityError", error);
    } catch (const InvalidArgument& error) {
      Raise("InvalidArgument", error);
    } catch (const ConfigError& error) {
      Raise("ConfigError", error);
    } catch (const WeightsError& error) {
      Raise("WeightsError", error);
    } catch (const UnsupportedError& error) {
      Raise("UnsupportedError", error);
    } catch (const OutOfMemoryError& error) {
      Raise("OutOfMemoryError", error);
    } catch (const BackendError& error) {
      Raise("BackendError", error);
    } catch (const TidalError& error) {
      Raise("TidalError", error);
    } catch (const std::bad_alloc&) {
      Raise("OutOfMemoryError", kNoHostMemory);
    } catch (const std::length_error&) {  // a container of more elements than there can be
      Raise("OutOfMemoryError", kNoHostMemory);
    }
  });
}

}  // namespace tidal
