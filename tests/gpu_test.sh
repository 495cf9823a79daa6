#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds everything, runs the C++ and Python tests on the GPU, the small
# op tests under compute-sanitizer, and short benchmarks. Writes JSON into benchmarks/results/gpu-DATE.
#
#   PYTHON       the Python to use if it has what the tests need (default python3), else .venv is made
#   BUILD        build folder (default build/cuda-release)
#   OUT          where the JSON goes (default benchmarks/results/gpu-DATE)
#   MODEL        a model folder for the benchmark (default: the packaged tidal-demo)
#   MODEL_ARGS   more arguments for benchmarks/bench_generate.py
#   SKIP_SANITIZER=1  leaves compute-sanitizer out
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
build=${BUILD:-build/cuda-release}
out=${OUT:-benchmarks/results/gpu-$(date +%F)}
needs="import numpy, safetensors, tokenizers, jinja2, transformers, typer, rich, pytest, torch, pybind11, scipy_openblas32"
if ! "$python" -c "$needs" 2>/dev/null; then
  make .venv/.test-deps .venv/.installed
  python=.venv/bin/python
fi
mkdir -p "$out" "$build"
jobs=$(nproc)

echo "== build"
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DTIDAL_CUDA=ON -DTIDAL_TESTS=ON -DTIDAL_BENCHMARKS=ON \
  -DTIDAL_PYTHON=ON -DPython_EXECUTABLE="$(command -v "$python")" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >"$build/configure.log" 2>&1 ||
  { cat "$build/configure.log"; exit 1; }
cmake --build "$build" -j "$jobs"
# The package as it would be installed, but with the build tree's library paths.
rm -rf "$build/site"
mkdir "$build/site"
cp -r python/tidaldecode "$build/site/"
cp "$build"/_core*.so "$build/libtidal_cuda.so" "$build/site/tidaldecode/"
export PYTHONPATH="$PWD/$build/site${PYTHONPATH:+:$PYTHONPATH}"

status=0
echo "== C++ tests"
# In several processes: a test waits for the host, which works out what is expected, more than for
# the GPU. Those of the CPU backend alone are `make test`'s.
shards=$((jobs < 4 ? 1 : jobs > 16 ? 14 : jobs - 2))
rm -f "$build"/gtest-*.json
pids=()
for ((shard = 0; shard < shards; shard++)); do
  OMP_NUM_THREADS=$((jobs / shards)) GTEST_TOTAL_SHARDS=$shards GTEST_SHARD_INDEX=$shard "$build/tidal_tests" \
    --gtest_filter='-*/cpu_*' --gtest_brief=1 --gtest_output="json:$build/gtest-$shard.json" >"$build/gtest-$shard.log" 2>&1 &
  pids+=($!)
done
for ((shard = 0; shard < shards; shard++)); do
  wait "${pids[$shard]}" || { status=1; grep -B 20 FAILED "$build/gtest-$shard.log" || tail -n 30 "$build/gtest-$shard.log"; }
  tail -n 3 "$build/gtest-$shard.log"
done

echo "== Python tests on the GPU"
"$python" -m pytest -q -m gpu --ignore tests/python/test_features.py --junitxml="$build/pytest.xml" || status=1
# The features on the CPU too: one run makes the whole table.
"$python" -m pytest -q tests/python/test_features.py --feature-results "$build/features.json" \
  --deselect tests/python/test_features.py::test_the_table_names_every_feature || status=1
"$python" tools/feature_table.py --results "$build/features.json"

# The op tests in one dtype; racecheck, some twenty times slower, on one shape of each kernel and
# without the matrix library's own kernels.
sanitize() {  # tool, gtest filter
  echo "== compute-sanitizer $1"
  compute-sanitizer --tool "$1" --error-exitcode 9 --log-file "$build/$1.log" \
    "$build/tidal_tests" --gtest_brief=1 --gtest_filter="$2" >"$build/$1.out" 2>&1 ||
    { status=1; tail -n 30 "$build/$1.log" "$build/$1.out"; }
  tail -n 1 "$build/$1.log"
}
if [ "${SKIP_SANITIZER:-0}" = 0 ]; then
  sanitize memcheck 'Backends/Op*cuda_bfloat16*:-*17408*'  # large ones take minutes each
  sanitize racecheck "Backends/OpAttention*Match*cuda_bfloat16_group5_d64*:\
Backends/OpAttention*Match*cuda_bfloat16_group2_d128*:Backends/OpR*cuda_bfloat16*:\
Backends/OpSelectTopK.T*cuda_bfloat16_kv_head_sum:Backends/OpSample.DrawsEqualTheR*cuda_bfloat16:\
Backends/OpFused*cuda_bfloat16_tokens3:Backends/OpFused*cuda_bfloat16_tokens2_long:\
Backends/OpFused*cuda_bfloat16_tokens13*:Backends/OpFused*cuda_bfloat16_tokens16:\
Backends/OpBatchInvariantAttention.Full*cuda_bfloat16_mha:\
Backends/OpCodedLinear.A*cuda_bfloat16_int4_576x192:Backends/OpShadow.A*cuda_bfloat16*d80*:\
Backends/OpAttentionDecode.F*cuda_bfloat16_group3_d80*"
fi

echo "== benchmark"
"$python" benchmarks/bench_generate.py "${MODEL:-python/tidaldecode/models/tidal-demo}" --device cuda \
  --output "$out/decode.json" ${MODEL_ARGS:-} || status=1
"$build/bench_ops" >"$out/ops.jsonl" || status=1

"$python" tools/gpu_report.py --build "$build" --shards "$shards" --output "$out/tests.json"
exit $status
