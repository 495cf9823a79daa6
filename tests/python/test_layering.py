"""The house rules that a text search can check: who includes whom, what must not occur, file sizes.

The layering is the one CONTRIBUTING.md draws: an arrow that is missing there is an error here.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CODE_SUFFIXES = {".h", ".cc", ".cu", ".cuh", ".cpp"}
MAX_LINES = 500
MAX_KERNEL_LINES = 700
MAX_FUNCTION_LINES = 60

# Who decides what goes through the layers next sees values only: no runner, backend or model.
DECIDING = ("tidal/", "core/", "kv/", "decode/batch.h", "engine/chunk_cost.h")
DECIDING += ("engine/guidance.h", "engine/ngram_index.h", "engine/request_state.h")
DECIDING += ("engine/scheduler.h",)
DECIDING_FILES = ("chunk_cost", "guidance", "ngram_index", "request_state", "scheduler")
DECIDING_FILES += ("scheduler_guides", "scheduler_plan", "scheduler_room")

# Folder -> prefixes its quoted includes may start with. "backend/*" is the seam: headers directly
# in cpp/src/backend, not those of one backend. The longest match counts.
ALLOWED_INCLUDES = {
    "cpp/include/tidal": ("tidal/",),
    "cpp/src/core": ("tidal/", "core/"),
    "cpp/src/backend": ("tidal/", "core/", "backend/*"),
    "cpp/src/backend/make_backend.cc": ("tidal/", "core/", "backend/*", "backend/cpu/"),
    "cpp/src/backend/cpu": ("tidal/", "core/", "backend/*", "backend/cpu/"),
    "cpp/src/kv": ("tidal/", "core/", "backend/*", "kv/"),
    "cpp/src/model": ("tidal/", "core/", "backend/*", "model/"),
    "cpp/src/decode": ("tidal/", "core/", "backend/*", "kv/", "model/", "decode/"),
    "cpp/src/engine": ("tidal/", "core/", "backend/*", "kv/", "model/", "decode/", "engine/"),
    **{f"cpp/src/engine/{f}{s}": DECIDING for f in DECIDING_FILES for s in (".h", ".cc")},
    "cuda": ("tidal/", "core/", "backend/*", "common/", "kernels/", "cuda_", "cudnn_attention"),
    "cuda/common": ("tidal/", "core/", "backend/*", "common/"),
    "cuda/kernels": ("tidal/", "core/", "backend/*", "common/", "kernels/"),
    "python/bindings": ("tidal/", "bindings", "closable", "native_call"),
}
INCLUDE_ROOTS = ("cpp/include", "cpp/src", "cuda", "python/bindings")

CUDA_HEADER = re.compile(r"^(cuda|cublas|cudnn|cub/|cooperative_groups|mma\.h|nvtx|nvml|thrust/)")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)

# Environment variables the program may read, and why.
ALLOWED_ENVIRONMENT = {
    "TIDAL_LOG": "log level",
    "OMP_NUM_THREADS": "thread count of the CPU backend",
    "NO_COLOR": "plain output",
    "OPENBLAS_NUM_THREADS": "set while OpenBLAS is loaded, and put back",
    "XDG_CACHE_HOME": "place of the user's cache, by the platform's convention",
    "RAY_USAGE_STATS_ENABLED": "set: Ray reports to nobody",
    "RAY_AUTH_MODE": "set: Ray takes orders from who has its token only",
    "HF_HOME": "place of the hub's cache, by its library's convention",
    "HF_HUB_CACHE": "the same",
    "HUGGINGFACE_HUB_CACHE": "the same, by its older name",
}


def native_files() -> list[Path]:
    folders = [ROOT / "cpp", ROOT / "cuda", ROOT / "python" / "bindings"]
    return sorted(f for d in folders for f in d.rglob("*") if f.suffix in CODE_SUFFIXES)


def python_files(*folders: str) -> list[Path]:
    return sorted(f for folder in folders for f in (ROOT / folder).rglob("*.py"))


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def rule_for(file: Path) -> tuple[str, ...] | None:
    places = [p for p in ALLOWED_INCLUDES if f"{name_of(file)}/".startswith(p + "/")]
    return ALLOWED_INCLUDES[max(places, key=len)] if places else None


def is_allowed(include: str, prefixes: tuple[str, ...]) -> bool:
    for prefix in prefixes:
        if prefix == "backend/*":
            if re.fullmatch(r"backend/[^/]+\.h", include):
                return True
        elif include.startswith(prefix):
            return True
    return False


def test_the_tree_is_where_this_test_looks():
    assert len(native_files()) > 20
    assert len(python_files("python/tidaldecode")) > 5


def test_every_native_folder_has_a_rule():
    missing = [name_of(f) for f in native_files() if rule_for(f) is None]
    assert not missing, f"add these folders to ALLOWED_INCLUDES: {missing}"


def test_includes_follow_the_layering():
    wrong = [
        f"{name_of(file)} includes {include}"
        for file in native_files()
        for kind, include in INCLUDE.findall(file.read_text())
        if kind == '"' and not is_allowed(include, rule_for(file) or ())
    ]
    assert not wrong, "\n".join(wrong)


def test_the_scheduler_is_where_its_rule_looks():
    for stem in DECIDING_FILES:
        assert (ROOT / "cpp/src/engine" / f"{stem}.cc").is_file(), stem


def test_only_the_engine_knows_the_front_door():
    rooms = ("cpp/src/engine/", "python/bindings/")
    wrong = [
        name_of(file)
        for file in native_files()
        if '"tidal/decoder.h"' in file.read_text() and not name_of(file).startswith(rooms)
    ]
    assert not wrong, f"include what they need of cpp/include/tidal in its place: {wrong}"


def test_quoted_includes_are_ours_and_exist():
    wrong = [
        f"{name_of(file)} includes {include}"
        for file in native_files()
        for kind, include in INCLUDE.findall(file.read_text())
        if kind == '"' and not any((ROOT / base / include).is_file() for base in INCLUDE_ROOTS)
    ]
    assert not wrong, "\n".join(wrong)


def test_cuda_headers_stay_under_cuda():
    wrong = [
        f"{name_of(file)} includes {include}"
        for file in native_files()
        for _, include in INCLUDE.findall(file.read_text())
        if CUDA_HEADER.match(include) and not name_of(file).startswith("cuda/")
    ]
    assert not wrong, "\n".join(wrong)


def test_only_make_backend_asks_whether_cuda_was_built():
    condition = re.compile(r"^\s*#\s*(?:if|ifdef|ifndef|elif)\b.*CUDA.*", re.MULTILINE)
    wrong = [
        f"{name_of(file)}: {line}"
        for file in native_files()
        if not name_of(file).startswith("cuda/") and file.name != "make_backend.cc"
        for line in condition.findall(file.read_text())
        if "__CUDACC__" not in line  # the compiler's own macro: shared host and device arithmetic
    ]
    assert not wrong, "\n".join(wrong)


def test_headers_open_with_pragma_once_and_have_no_using_namespace():
    for file in native_files():
        if file.suffix in {".h", ".cuh"}:
            text = file.read_text()
            assert "#pragma once" in text, name_of(file)
            assert not re.search(r"^\s*using namespace", text, re.MULTILINE), name_of(file)


@pytest.mark.parametrize(
    "pattern",
    [
        r"trust_remote_code\s*=\s*True",
        r"pickle\.loads?\b",
        r"torch\.load\b",
        r"(?<![\w.])eval\(",
        r"(?<![\w.])exec\(",
        r"shell\s*=\s*True",
    ],
)
def test_a_model_folder_can_never_run_code(pattern: str):
    hits = [name_of(f) for f in python_files("python") if re.search(pattern, f.read_text())]
    assert not hits, f"{pattern} in {hits}"


def test_importing_the_package_needs_no_torch():
    wrong = []
    for file in python_files("python/tidaldecode"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            wrong += [name_of(file) for m in modules if m.split(".")[0] == "torch"]
    assert not wrong, wrong


def test_files_are_short():
    files = native_files() + python_files("python", "tests", "benchmarks", "tools")
    files += [f for f in (ROOT / "tests").rglob("*") if f.suffix in CODE_SUFFIXES]
    for file in files:
        limit = MAX_KERNEL_LINES if name_of(file).startswith("cuda/kernels/") else MAX_LINES
        lines = len(file.read_text().splitlines())
        assert lines <= limit, f"{name_of(file)}: {lines} lines, at most {limit}"


def test_python_functions_are_short():
    for file in python_files("python", "tests", "benchmarks", "tools"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                # A docstring is no complexity: it does not count.
                if docstring := ast.get_docstring(node, clean=False):
                    lines -= docstring.count("\n") + 1
                limit = MAX_FUNCTION_LINES
                assert lines <= limit, f"{name_of(file)}: {node.name} has {lines} lines"


def test_no_file_is_a_drawer_for_leftovers():
    files = native_files() + python_files("python", "tests", "benchmarks", "tools")
    bad = [name_of(f) for f in files if re.search(r"(^|_)(utils?|helpers?|misc)$", f.stem)]
    assert not bad, bad


def test_the_environment_is_not_a_second_configuration():
    read = re.compile(r"(?:getenv\(|environ(?:\.get\(|\[))\s*([^\s,)\]]*)")
    for file in native_files() + python_files("python/tidaldecode"):
        for argument in read.findall(file.read_text()):
            variable = argument.strip("\"'")
            assert variable in ALLOWED_ENVIRONMENT, f"{name_of(file)} reads {argument}"
