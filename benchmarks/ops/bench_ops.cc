// Microseconds per op of a decode step, through the Backend seam, as a decode step calls them:
// attention and selection, and the projections of Llama-3.1-8B; and of attention over prompts, and
// their products.
//
// Every row of a decode step runs one op on many caches (or weights) in turn, more than the L2
// holds, recorded as one step; the time is that of several replays queued back to back, divided by
// the ops in them, launch gaps included. Rows of prompts queue all chunks of one layer's attention
// one by one, with the engine's own kernel and, where it is installed, with cuDNN. Medians of
// `--samples` such measurements. Random data. One JSON line per row on stdout.
//
//   bench_ops [--samples 20] [--filter TEXT]
#include <cstdio>
#include <exception>
#include <string>

#include "rows.h"

int main(int argc, char** argv) {
  int samples = 20;
  std::string filter;
  for (int i = 1; i + 1 < argc; i += 2) {
    std::string option = argv[i], value = argv[i + 1];
    if (option == "--samples") samples = std::stoi(value);
    if (option == "--filter") filter = value;
  }
  try {
    tidal::BenchDevice bench({.device = {tidal::DeviceType::kCuda, 0}}, samples);
    bench.Report();
    tidal::MeasurePromptAttention(bench, filter);
    tidal::MeasureDecodeAttention(bench, filter);
    tidal::MeasureScoredLayers(bench, filter);
    tidal::MeasureProjections(bench, filter);
    tidal::MeasurePromptProducts(bench, filter);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_ops: %s\n", error.what());
    return 1;
  }
}
