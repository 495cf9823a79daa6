// NativeCall: a stretch of work without the GIL, and how such work ends with the interpreter.
//
// While the interpreter is finalised, a daemon thread that asks for the GIL is ended by
// pthread_exit (up to Python 3.13), which C++ frames turn into std::terminate. So the atexit
// function that RegisterExit() leaves waits until no other thread is in a NativeCall; a thread that
// comes out of one after that, or wants to begin one, sleeps until the process is gone.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <utility>

namespace tidal {

class NativeCall {
 public:
  // The calling thread holds the GIL, and does not from here on.
  NativeCall();
  ~NativeCall();
  NativeCall(const NativeCall&) = delete;
  NativeCall& operator=(const NativeCall&) = delete;

  // Holds the GIL again, for a call back into Python from within.
  class Callback {
   public:
    explicit Callback(NativeCall& call) : call_(call) { call_.TakeGil(); }
    ~Callback() { call_.LeaveGil(); }
    Callback(const Callback&) = delete;
    Callback& operator=(const Callback&) = delete;

   private:
    NativeCall& call_;
  };

 private:
  void TakeGil();
  void LeaveGil();

  PyThreadState* state_ = nullptr;
};

// Makes the end of the interpreter wait for native calls. Call once, when the module is made.
void RegisterExit();

// Calls work(object) without the GIL. Should the caller hold the last reference, the object is
// destroyed without it too.
template <typename T, typename Work>
auto WithoutGil(std::shared_ptr<T> object, const Work& work) {
  NativeCall call;
  std::shared_ptr<T> owned = std::move(object);
  return work(*owned);
}

}  // namespace tidal
