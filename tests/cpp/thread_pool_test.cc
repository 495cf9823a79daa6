// ThreadPool: every thread takes part once, exceptions come out, and a forked child is refused.
#include "core/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <stdexcept>

#include "throws.h"
#include "tidal/error.h"

namespace tidal::test {
namespace {

TEST(ThreadPool, CallsEveryThreadOnce) {
  ThreadPool pool(4);
  for (int round = 0; round < 2000; ++round) {
    const int threads = round % 4 + 1;
    std::array<int, 4> calls{};
    pool.Run(threads, [&](int thread) {
      EXPECT_EQ(ThreadPool::ThreadIndex(), thread);
      ++calls[static_cast<size_t>(thread)];
    });
    for (int thread = 0; thread < 4; ++thread) {
      ASSERT_EQ(calls[static_cast<size_t>(thread)], thread < threads ? 1 : 0) << round;
    }
  }
}

TEST(ThreadPool, ThreadsThatSleepAreWoken) {
  ThreadPool pool(3);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
    std::atomic<int> calls{0};
    pool.Run(3, [&](int thread) {
      if (thread > 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      ++calls;
    });
    EXPECT_EQ(calls, 3);
  }
}

TEST(ThreadPool, AnExceptionOfAnyThreadComesOutAndTheNextRunIsWhole) {
  ThreadPool pool(3);
  for (int thrower = 0; thrower < 3; ++thrower) {
    EXPECT_THROW(pool.Run(3,
                          [&](int thread) {
                            if (thread == thrower) throw std::runtime_error("of a thread");
                          }),
                 std::runtime_error);
    std::atomic<int> calls{0};
    pool.Run(3, [&](int) { ++calls; });
    EXPECT_EQ(calls, 3);
  }
}

// Exit code of a child that runs `action`; -1 if it was killed.
template <typename Action>
int ExitCodeOfFork(const Action& action) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(action());
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

#ifndef __SANITIZE_THREAD__  // which takes no new threads in a child of a process with threads
TEST(ThreadPool, AForkedChildIsRefusedAndMayMakeItsOwn) {
  auto pool = std::make_unique<ThreadPool>(3);
  pool->Run(3, [](int) {});
  EXPECT_EQ(ExitCodeOfFork([&] {
              try {
                pool->Run(3, [](int) {});
                return 1;
              } catch (const UnsupportedError&) {
              }
              pool.reset();
              std::atomic<int> calls{0};
              ThreadPool(3).Run(3, [&](int) { ++calls; });
              return calls == 3 ? 0 : 2;
            }),
            0);
  std::atomic<int> calls{0};
  pool->Run(3, [&](int) { ++calls; });
  EXPECT_EQ(calls, 3);
}

#ifndef __SANITIZE_ADDRESS__  // which needs more address space than any limit here
TEST(ThreadPool, NoMoreThreadsIsAnErrorThatNamesTheSetting) {
  EXPECT_EQ(ExitCodeOfFork([] {
              const rlimit small = {64 << 20, 64 << 20};  // a stack takes 8 MiB
              setrlimit(RLIMIT_AS, &small);
              auto refused = Throws<OutOfMemoryError>(
                  [] { ThreadPool pool(500); }, {"num_threads: got 500", "lower num_threads"});
              return refused ? 0 : 1;
            }),
            0);
}
#endif
#endif

}  // namespace
}  // namespace tidal::test
