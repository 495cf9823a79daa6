// Limits of containers, read from files that look like the kernel's.
#include "core/container.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

namespace tidal::test {
namespace {

constexpr int64_t kGiB = int64_t{1} << 30;

class Container : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    root_ = ::testing::TempDir() + "tidal_" + test->name();
    std::filesystem::remove_all(root_);
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  void Write(const std::string& path, const std::string& text) const {
    const std::filesystem::path file = root_ + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text << "\n";
  }

  void ExpectMemory(int64_t total, int64_t free) const {
    const std::optional<ContainerMemory> memory = ReadContainerMemory(root_);
    ASSERT_TRUE(memory.has_value());
    EXPECT_EQ(memory->total_bytes, total);
    EXPECT_EQ(memory->free_bytes, free);
  }

  std::string root_;
};

TEST_F(Container, NoFilesNoLimits) {
  EXPECT_FALSE(ReadContainerMemory(root_).has_value());
  EXPECT_FALSE(ReadProcessorQuota(root_).has_value());
}

TEST_F(Container, Version2CountsFileCacheThatCanBeDroppedAsFree) {
  Write("/proc/self/cgroup", "0::/");
  Write("/sys/fs/cgroup/memory.max", std::to_string(4 * kGiB));
  Write("/sys/fs/cgroup/memory.current", std::to_string(3 * kGiB));
  Write("/sys/fs/cgroup/memory.stat", "anon 5\nfile 7\ninactive_file " + std::to_string(2 * kGiB));
  ExpectMemory(4 * kGiB, 3 * kGiB);
}

TEST_F(Container, Version2Unlimited) {
  Write("/proc/self/cgroup", "0::/");
  Write("/sys/fs/cgroup/memory.max", "max");
  Write("/sys/fs/cgroup/cpu.max", "max 100000");
  EXPECT_FALSE(ReadContainerMemory(root_).has_value());
  EXPECT_FALSE(ReadProcessorQuota(root_).has_value());
}

// The limit of a service, inside that of its slice, which others have used up.
TEST_F(Container, TheSmallestLimitOfNestedGroupsCounts) {
  Write("/proc/self/cgroup", "0::/my.slice/app.service");
  Write("/sys/fs/cgroup/my.slice/app.service/memory.max", std::to_string(2 * kGiB));
  Write("/sys/fs/cgroup/my.slice/app.service/memory.current", std::to_string(kGiB));
  Write("/sys/fs/cgroup/my.slice/memory.max", std::to_string(8 * kGiB));
  Write("/sys/fs/cgroup/my.slice/memory.current", std::to_string(8 * kGiB - 5));
  Write("/sys/fs/cgroup/my.slice/app.service/cpu.max", "400000 100000");
  Write("/sys/fs/cgroup/my.slice/cpu.max", "250000 100000");
  ExpectMemory(2 * kGiB, 5);
  EXPECT_EQ(ReadProcessorQuota(root_), 3);
}

// A container without a namespace of its own for groups: the path is the host's.
TEST_F(Container, AGroupThatCannotBeSeenIsTheRootOfWhatCan) {
  Write("/proc/self/cgroup", "0::/docker/0123abcd");
  Write("/sys/fs/cgroup/memory.max", std::to_string(kGiB));
  Write("/sys/fs/cgroup/memory.current", "0");
  Write("/sys/fs/cgroup/cpu.max", "50000 100000");
  ExpectMemory(kGiB, kGiB);
  EXPECT_EQ(ReadProcessorQuota(root_), 1);
}

TEST_F(Container, Version1) {
  Write("/proc/self/cgroup", "4:memory:/a\n2:cpu,cpuacct:/b\n0::/");
  Write("/sys/fs/cgroup/memory/a/memory.limit_in_bytes", std::to_string(2 * kGiB));
  Write("/sys/fs/cgroup/memory/a/memory.usage_in_bytes", std::to_string(kGiB));
  Write("/sys/fs/cgroup/memory/a/memory.stat", "inactive_file 9\ntotal_inactive_file 100");
  Write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712");  // none
  Write("/sys/fs/cgroup/cpu,cpuacct/b/cpu.cfs_quota_us", "150000");
  Write("/sys/fs/cgroup/cpu,cpuacct/b/cpu.cfs_period_us", "100000");
  ExpectMemory(2 * kGiB, kGiB + 100);
  EXPECT_EQ(ReadProcessorQuota(root_), 2);
}

TEST_F(Container, Version1Unlimited) {
  Write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712");
  Write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1");
  Write("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000");
  EXPECT_FALSE(ReadContainerMemory(root_).has_value());
  EXPECT_FALSE(ReadProcessorQuota(root_).has_value());
}

TEST_F(Container, MoreUsedThanAllowedLeavesNothing) {
  Write("/sys/fs/cgroup/memory.max", "1000");
  Write("/sys/fs/cgroup/memory.current", "2000");
  Write("/sys/fs/cgroup/memory.stat", "inactive_file 100");
  ExpectMemory(1000, 0);
}

TEST_F(Container, DamagedFilesAreNoLimit) {
  Write("/proc/self/cgroup", "no colons\n:\n0:");
  Write("/sys/fs/cgroup/memory.max", "lots");
  Write("/sys/fs/cgroup/cpu.max", "0 0");
  Write("/sys/fs/cgroup/memory.stat", "inactive_file many");
  EXPECT_FALSE(ReadContainerMemory(root_).has_value());
  EXPECT_FALSE(ReadProcessorQuota(root_).has_value());
}

TEST(DefaultThreads, AreAtLeastOne) {
  EXPECT_GE(DefaultNumThreads(), 1);
}

}  // namespace
}  // namespace tidal::test
