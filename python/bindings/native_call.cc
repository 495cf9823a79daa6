#include "native_call.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "bindings.h"
#include "tidal/decoder.h"

namespace py = pybind11;

namespace tidal {
namespace {

// One for the interpreter's process.
struct CallState {
  std::atomic<int> num_calls{0};  // threads in a NativeCall
  std::atomic<bool> is_ending{false};
  std::thread::id ender;  // the thread that ends the interpreter; set before is_ending
};

CallState& State() {
  static auto* state = new CallState;  // threads may look at it until the process is gone
  return *state;
}

// A thread that must not ask for the GIL any more sleeps here.
void SleepIfEnding() {
  CallState& state = State();
  if (!state.is_ending || std::this_thread::get_id() == state.ender) return;
  --state.num_calls;
  while (true) pause();
}

// The atexit function.
void EndCalls() {
  CallState& state = State();
  state.ender = std::this_thread::get_id();
  state.is_ending = true;
  EndAllCalls();
  while (state.num_calls > 0) {
    {
      py::gil_scoped_release release;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CheckSignals();
  }
}

}  // namespace

NativeCall::NativeCall() {
  ++State().num_calls;
  LeaveGil();
}

NativeCall::~NativeCall() {
  TakeGil();
  --State().num_calls;
}

void NativeCall::TakeGil() {
  SleepIfEnding();
  PyEval_RestoreThread(state_);
}

void NativeCall::LeaveGil() {
  state_ = PyEval_SaveThread();
  SleepIfEnding();
}

void CheckSignals() {
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void RegisterExit() {
  // A forked child has none of its parent's threads.
  pthread_atfork(nullptr, nullptr, [] { State().num_calls = 0; });
  py::module_::import("atexit").attr("register")(py::cpp_function(&EndCalls));
}

}  // namespace tidal
