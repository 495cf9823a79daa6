// TensorView and Buffer: looking at memory, and owning it.
#include "core/tensor_view.h"

#include <gtest/gtest.h>

#include <utility>

#include "core/buffer.h"

namespace tidal::test {
namespace {

TEST(TensorView, DefaultIsAbsent) {
  EXPECT_FALSE(TensorView());
  EXPECT_EQ(TensorView().rank, 0);
}

TEST(TensorView, CountsElementsAndBytes) {
  float data[24] = {};
  const TensorView view(data, DType::kFloat32, {2, 3, 4});
  EXPECT_TRUE(view);
  EXPECT_EQ(view.rank, 3);
  EXPECT_EQ(view.dim(0), 2);
  EXPECT_EQ(view.dim(2), 4);
  EXPECT_EQ(view.numel(), 24);
  EXPECT_EQ(view.bytes(), 96);
  EXPECT_EQ(view.data<float>(), data);
}

TEST(TensorView, BytesFollowTheDtype) {
  uint8_t data[8] = {};
  EXPECT_EQ(TensorView(data, DType::kUInt8, {5}).bytes(), 5);
  EXPECT_EQ(TensorView(data, DType::kBFloat16, {5}).bytes(), 10);
  EXPECT_EQ(TensorView(data, DType::kFloat16, {5}).bytes(), 10);
  EXPECT_EQ(TensorView(data, DType::kInt32, {5}).bytes(), 20);
}

TEST(TensorView, RowsLooksAtTheSameMemory) {
  int32_t data[12] = {};
  const TensorView view(data, DType::kInt32, {4, 3});
  const TensorView rows = view.Rows(1, 2);
  EXPECT_EQ(rows.data<int32_t>(), data + 3);
  EXPECT_EQ(rows.dim(0), 2);
  EXPECT_EQ(rows.dim(1), 3);
  EXPECT_EQ(rows.Rows(1, 1).data<int32_t>(), data + 6);
}

TEST(TensorView, RowsMayBeEmpty) {
  int32_t data[12] = {};
  const TensorView view(data, DType::kInt32, {4, 3});
  EXPECT_EQ(view.Rows(4, 0).numel(), 0);
  EXPECT_EQ(TensorView(data, DType::kInt32, {0, 3}).Rows(0, 0).bytes(), 0);
}

TEST(Buffer, FreesOnceHoweverOftenMoved) {
  int freed = 0;
  int memory = 0;
  {
    Buffer first(&memory, sizeof(memory), [&](void* data) {
      EXPECT_EQ(data, &memory);
      ++freed;
    });
    Buffer second(std::move(first));
    Buffer third;
    third = std::move(second);
    EXPECT_EQ(third.data(), &memory);
    EXPECT_EQ(third.bytes(), static_cast<int64_t>(sizeof(memory)));
    EXPECT_EQ(freed, 0);
  }
  EXPECT_EQ(freed, 1);
}

TEST(Buffer, AssignmentFreesWhatWasHeld) {
  int freed = 0;
  int a = 0, b = 0;
  Buffer buffer(&a, 4, [&](void*) { ++freed; });
  buffer = Buffer(&b, 4, [&](void*) { freed += 10; });
  EXPECT_EQ(freed, 1);
  buffer = Buffer();
  EXPECT_EQ(freed, 11);
}

}  // namespace
}  // namespace tidal::test
