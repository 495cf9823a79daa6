// FileWeightSource: tensors at offsets of files, and files that are not what they should be.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "throws.h"
#include "tidal/error.h"
#include "tidal/weights.h"

namespace tidal::test {
namespace {

class FileWeights : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    path_ = ::testing::TempDir() + "tidal_" + test->name() + ".bin";
    std::ofstream(path_, std::ios::binary) << "headerABCDEFGH";
  }
  void TearDown() override { std::remove(path_.c_str()); }

  WeightFileEntry Entry(const std::string& name, int64_t offset) const {
    return {.name = name,
            .info = {DType::kFloat32, {2}},
            .path = path_,
            .file_offset = offset,
            .identity = Identity()};
  }

  FileIdentity Identity() const {
    struct stat status = {};
    stat(path_.c_str(), &status);
    return {.device = status.st_dev,
            .inode = status.st_ino,
            .size = status.st_size,
            .mtime_ns = status.st_mtim.tv_sec * 1'000'000'000 + status.st_mtim.tv_nsec};
  }

  // Puts another file of the same size in its place, as an update of a folder does.
  void Replace() const {
    const std::string other = path_ + ".new";
    std::ofstream(other, std::ios::binary) << "headerabcdefgh";
    std::filesystem::rename(other, path_);
  }

  std::string path_;
};

TEST_F(FileWeights, FindsByName) {
  const FileWeightSource source({Entry("a", 6), Entry("b", 8)});
  ASSERT_NE(source.Find("b"), nullptr);
  EXPECT_EQ(source.Find("b")->shape, (std::vector<int64_t>{2}));
  EXPECT_EQ(source.Find("c"), nullptr);
}

TEST_F(FileWeights, ReadsPiecesFromTheTensorsStart) {
  const FileWeightSource source({Entry("a", 6)});
  std::string bytes(3, '\0');
  source.Read("a", 0, 3, bytes.data());
  EXPECT_EQ(bytes, "ABC");
  source.Read("a", 5, 3, bytes.data());
  EXPECT_EQ(bytes, "FGH");
}

TEST_F(FileWeights, AFileCutShortIsAnError) {
  const FileWeightSource source({Entry("layer.weight", 6)});
  std::string bytes(16, '\0');
  EXPECT_TRUE(Throws<WeightsError>([&] { source.Read("layer.weight", 0, 16, bytes.data()); },
                                   {"layer.weight", path_, "8 bytes early"}));
}

// What several threads read, at offsets that divide nothing.
TEST_F(FileWeights, LargePiecesArriveWhole) {
  std::string want(9'000'001, '\0');
  uint32_t state = 1;
  for (char& byte : want) byte = static_cast<char>((state = state * 1664525u + 1013904223u) >> 24);
  std::ofstream(path_, std::ios::binary) << "head" << want;
  const FileWeightSource source({Entry("a", 4)});
  std::string bytes(want.size() - 77, '\0');
  source.Read("a", 77, static_cast<int64_t>(bytes.size()), bytes.data());
  EXPECT_TRUE(bytes == want.substr(77));
}

TEST_F(FileWeights, ALargePieceCutShortSaysHowMuchIsMissing) {
  constexpr int64_t kThere = 5'000'000, kAsked = 9'000'000;
  std::ofstream(path_, std::ios::binary) << std::string(kThere, 'x');
  const FileWeightSource source({Entry("a", 0)});
  std::string bytes(kAsked, '\0');
  EXPECT_TRUE(Throws<WeightsError>([&] { source.Read("a", 0, kAsked, bytes.data()); },
                                   {"a", path_, "4000000 bytes early"}));
}

// Every other row of a matrix, and its transposed: what each piece of them is.
TEST_F(FileWeights, TensorsWithStridesArriveInTheirOwnOrder) {
  constexpr int64_t kRows = 70, kColumns = 1300;  // as stored, of float32
  std::vector<uint32_t> stored(kRows * kColumns);
  for (size_t i = 0; i < stored.size(); ++i) stored[i] = static_cast<uint32_t>(i);
  std::ofstream(path_, std::ios::binary)
      .write(reinterpret_cast<const char*>(stored.data()), kRows * kColumns * 4);
  auto with = [&](const char* name, int64_t first, std::vector<int64_t> shape,
                  std::vector<int64_t> strides) {
    WeightFileEntry entry = Entry(name, first * 4);
    entry.info.shape = std::move(shape);
    entry.strides = std::move(strides);
    return entry;
  };
  const std::vector<WeightFileEntry> entries = {
      with("odd rows", kColumns, {kRows / 2, kColumns}, {2 * kColumns, 1}),
      with("even columns, transposed", 0, {kColumns / 2, kRows}, {2, kColumns}),
      with("a column", 3, {kRows}, {kColumns}),
  };
  const FileWeightSource source(entries);
  for (const WeightFileEntry& entry : entries) {
    SCOPED_TRACE(entry.name);
    const std::vector<int64_t>& shape = entry.info.shape;
    const bool is_matrix = shape.size() == 2;
    const int64_t columns = is_matrix ? shape[1] : 1, count = shape[0] * columns;
    for (const auto& [begin, end] :
         {std::pair<int64_t, int64_t>{0, count}, {count / 3, count / 2}, {count - 1, count}}) {
      std::vector<uint32_t> got(static_cast<size_t>(end - begin));
      source.Read(entry.name, begin * 4, (end - begin) * 4, got.data());
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = is_matrix ? i % columns * entry.strides[1] : 0;
        ASSERT_EQ(got[static_cast<size_t>(i - begin)],
                  entry.file_offset / 4 + i / columns * entry.strides[0] + column)
            << i;
      }
    }
    EXPECT_TRUE(Throws<InvalidArgument>([&] { source.Read(entry.name, 2, 4, nullptr); },
                                        {entry.name, "whole elements"}));
  }
}

TEST_F(FileWeights, StridesThatLeaveTheFileAreAnError) {
  for (const std::vector<int64_t>& strides : std::vector<std::vector<int64_t>>{
           {2}, {0}, {-1}, {int64_t{1} << 62}, {1, 1}}) {  // of two float32 in 8 bytes
    WeightFileEntry entry = Entry("a", 6);
    entry.strides = strides;
    EXPECT_TRUE(Throws<WeightsError>([&] { FileWeightSource({entry}); }, {"a", "strides", path_}));
  }
}

TEST_F(FileWeights, AMissingFileOrTensorIsAnError) {
  WeightFileEntry entry = Entry("a", 0);
  entry.path += ".not-there";
  const FileWeightSource source({entry});
  char byte;
  EXPECT_TRUE(Throws<WeightsError>([&] { source.Read("a", 0, 1, &byte); }, {entry.path}));
  EXPECT_TRUE(Throws<WeightsError>([&] { source.Read("z", 0, 1, &byte); }, {"z"}));
}

TEST_F(FileWeights, ADirectoryIsNoFile) {
  WeightFileEntry entry = Entry("a", 0);
  entry.path = ::testing::TempDir();
  const FileWeightSource source({entry});
  char byte;
  EXPECT_TRUE(Throws<WeightsError>([&] { source.Read("a", 0, 1, &byte); }, {entry.path}));
}

TEST_F(FileWeights, AFileReplacedBeforeItsTensorsAreReadIsAnError) {
  const FileWeightSource source({Entry("a", 6)});
  Replace();
  char byte;
  EXPECT_TRUE(Throws<WeightsError>([&] { source.Read("a", 0, 1, &byte); }, {path_, "replaced"}));
  EXPECT_TRUE(Throws<WeightsError>([&] { source.Read("a", 0, 1, &byte); }, {path_, "replaced"}));
}

TEST_F(FileWeights, AFileReplacedWhileItIsReadStaysTheOneThatWasDescribed) {
  const FileWeightSource source({Entry("a", 6)});
  std::string bytes(3, '\0');
  source.Read("a", 0, 3, bytes.data());
  Replace();
  source.Read("a", 0, 3, bytes.data());
  EXPECT_EQ(bytes, "ABC");
  source.CheckUnchanged();
}

TEST_F(FileWeights, AFileRewrittenInPlaceWhileItIsReadIsAnError) {
  const FileWeightSource source({Entry("a", 6)});
  char byte;
  source.Read("a", 0, 1, &byte);
  source.CheckUnchanged();
  std::filesystem::last_write_time(
      path_, std::filesystem::last_write_time(path_) + std::chrono::milliseconds(1));
  EXPECT_TRUE(Throws<WeightsError>([&] { source.CheckUnchanged(); }, {path_, "changed"}));
}

TEST_F(FileWeights, ATensorListedTwiceIsAnError) {
  EXPECT_TRUE(Throws<WeightsError>(
      [&] {
        FileWeightSource({Entry("a", 0), Entry("a", 6)});
      },
      {"a", "twice"}));
}

}  // namespace
}  // namespace tidal::test
