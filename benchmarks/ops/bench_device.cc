#include "bench_device.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <numeric>
#include <random>
#include <span>

namespace tidal {

BenchDevice::BenchDevice(const BackendOptions& options, int samples)
    : samples_(samples), backend_(MakeBackend(options)) {}

void BenchDevice::Report() const {
  std::string name = backend_->info().name, hardware;
  for (const DeviceStatus& status : ListDevices()) {
    if (status.name == name) hardware = status.hardware;
  }
  std::printf(
      "{\"benchmark\": \"bench_ops\", \"device\": \"%s\", \"dtype\": \"%s\", "
      "\"page_size\": %lld}\n",
      hardware.c_str(), DTypeName(kDType), static_cast<long long>(kPageSize));
}

TensorView BenchDevice::Tensor(DType dtype, std::initializer_list<int64_t> shape) {
  TensorView view(nullptr, dtype, shape);
  buffers_.push_back(backend_->Allocate(view.bytes(), "benchmark data"));
  view.ptr = buffers_.back().data();
  return view;
}

TensorView BenchDevice::Ints(const std::vector<int32_t>& values,
                             std::initializer_list<int64_t> shape) {
  TensorView view = Tensor(DType::kInt32, shape);
  backend_->Upload(view, values.data());
  return view;
}

TensorView BenchDevice::PageTable(int64_t rows, int64_t pages_per_row) {
  std::vector<int32_t> pages(static_cast<size_t>(rows * pages_per_row));
  std::iota(pages.begin(), pages.end(), 0);
  std::mt19937 engine(3);
  std::shuffle(pages.begin(), pages.end(), engine);
  return Ints(pages, {rows, pages_per_row});
}

TensorView BenchDevice::Random(DType dtype, std::initializer_list<int64_t> shape) {
  TensorView view = Tensor(dtype, shape);
  const Noise& noise = noise_.try_emplace(dtype, dtype, Normal{}, 1).first->second;
  for (int64_t done = 0; done < view.bytes();) {
    std::span<const char> piece = noise.From(done);
    const int64_t bytes = std::min(view.bytes() - done, static_cast<int64_t>(piece.size()));
    TensorView part(static_cast<char*>(view.ptr) + done, dtype, {bytes / DTypeBytes(dtype)});
    backend_->Upload(part, piece.data());
    done += bytes;
  }
  return view;
}

double BenchDevice::TimeOfStep(const std::function<void()>& step, int64_t ops_per_step) {
  ++step_id_;
  auto replay = [&] { backend_->RunStep({.batch_size = step_id_}, step); };
  for (int run = 0; run < 2; ++run) replay();  // it is recorded
  return MedianTime(replay, 10) / static_cast<double>(ops_per_step);
}

double BenchDevice::MedianTime(const std::function<void()>& work, int repeats) {
  constexpr int kWarmUp = 2;
  std::vector<double> us;
  for (int sample = 0; sample < samples_ + kWarmUp; ++sample) {
    Wait();
    auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < repeats; ++i) work();
    Wait();
    std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - start;
    if (sample >= kWarmUp) us.push_back(elapsed.count() / repeats);
  }
  std::nth_element(us.begin(), us.begin() + samples_ / 2, us.end());
  return us[static_cast<size_t>(samples_ / 2)];
}

void BenchDevice::Wait() {
  float ignored[1];
  TensorView first = buffers_.front().bytes() >= 4
                         ? TensorView(buffers_.front().data(), DType::kFloat32, {1})
                         : TensorView();
  backend_->Download(ignored, first);
}

}  // namespace tidal
