// The error types of the engine, one per kind of trouble a caller can act on.
//
// Every message says what it is about, what was got, what was expected and what to do.
// The bindings turn each type into the Python class of the same name
// (python/tidaldecode/errors.py).
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace tidal {

class TidalError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A value the caller passed is out of range or of the wrong kind.
class InvalidArgument : public TidalError {
 public:
  using TidalError::TidalError;
};

// A request needs more cache, batch rows or positions than the decoder was built with.
class CapacityError : public InvalidArgument {
 public:
  using InvalidArgument::InvalidArgument;
};

// config.json (or a plan file) describes something impossible or incomplete.
class ConfigError : public TidalError {
 public:
  using TidalError::TidalError;
};

// A weight is missing, unreadable or has the wrong shape or dtype.
class WeightsError : public TidalError {
 public:
  using TidalError::TidalError;
};

// The request is meaningful, but this build or device does not do it.
class UnsupportedError : public TidalError {
 public:
  using TidalError::TidalError;
};

class OutOfMemoryError : public TidalError {
 public:
  using TidalError::TidalError;
};

// The device or one of its libraries failed.
class BackendError : public TidalError {
 public:
  using TidalError::TidalError;
};

// "a", 1, 2.5 -> "a12.5": messages are written as one argument list.
template <typename... Parts>
std::string Concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace tidal

// User-facing check: throws `Error` with the given message parts if `condition` is false.
#define TIDAL_CHECK(condition, Error, ...)                       \
  do {                                                           \
    if (!(condition)) throw Error(::tidal::Concat(__VA_ARGS__)); \
  } while (0)
