// C++ errors become the Python classes of tidaldecode/errors.py of the same name.
#include <new>
#include <stdexcept>
#include <utility>

#include "bindings.h"
#include "tidal/error.h"

namespace py = pybind11;

namespace tidal {
namespace {

constexpr const char* kNoHostMemory =
    "host memory: there is none left; end other programs, raise the limit, or ask for less at "
    "once";

void Raise(const char* class_name, const char* text) {
  py::object cls = py::module_::import("tidaldecode.errors").attr(class_name);
  PyErr_SetString(cls.ptr(), text);
}

}  // namespace

void RegisterErrors() {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(std::move(pointer));
    } catch (const CapacityError& error) {
      Raise("CapacityError", error.what());
    } catch (const InvalidArgument& error) {
      Raise("InvalidArgument", error.what());
    } catch (const ConfigError& error) {
      Raise("ConfigError", error.what());
    } catch (const WeightsError& error) {
      Raise("WeightsError", error.what());
    } catch (const UnsupportedError& error) {
      Raise("UnsupportedError", error.what());
    } catch (const OutOfMemoryError& error) {
      Raise("OutOfMemoryError", error.what());
    } catch (const BackendError& error) {
      Raise("BackendError", error.what());
    } catch (const TidalError& error) {
      Raise("TidalError", error.what());
    } catch (const std::bad_alloc&) {
      Raise("OutOfMemoryError", kNoHostMemory);
    } catch (const std::length_error&) {  // a container of more elements than there can be
      Raise("OutOfMemoryError", kNoHostMemory);
    }
  });
}

}  // namespace tidal
