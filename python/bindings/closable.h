// Closable: what a Python object owns of the engine. Everything of the engine is shared, so that
// one thread may close what another one uses.
#pragma once

#include <memory>
#include <utility>

#include "native_call.h"
#include "tidal/error.h"

namespace tidal {

// All methods are called with the GIL held.
template <typename T>
class Closable {
 public:
  // `name` is what messages call it.
  Closable(const char* name, std::shared_ptr<T> object) : name_(name), object_(std::move(object)) {}
  ~Closable() { Drop(); }
  Closable(const Closable&) = delete;
  Closable& operator=(const Closable&) = delete;

  // Throws InvalidArgument once it is closed.
  std::shared_ptr<T> get() const {
    TIDAL_CHECK(object_ != nullptr, InvalidArgument, name_, ": it is closed; start a new one");
    return object_;
  }
  bool is_closed() const { return object_ == nullptr; }

  // Ends it, and waits for what is under way in it.
  void Close() {
    if (object_ != nullptr) WithoutGil(std::move(object_), [](T& object) { object.Close(); });
  }

 protected:
  void Drop() {
    if (object_ != nullptr) WithoutGil(std::move(object_), [](T&) {});
  }

 private:
  const char* name_;
  std::shared_ptr<T> object_;
};

}  // namespace tidal
