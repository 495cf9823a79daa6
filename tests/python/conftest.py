"""Options and fixtures that several test files share."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_REFERENCE_MODEL = ROOT.parent / "shared" / "models" / "reflm-30m"
DEFAULT_PUBLIC_MODELS = ROOT / "build" / "public-models"

# A shell has the programs that it starts in the background ignore it, and theirs too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

with contextlib.suppress(ImportError):  # not among what the tests of a GPU need
    from hypothesis import settings

    # The suite is the same every time; --hypothesis-profile=default looks for new cases.
    settings.register_profile("suite", derandomize=True)
    settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reference-model",
        type=Path,
        default=DEFAULT_REFERENCE_MODEL,
        metavar="DIR",
        help=f"folder of the trained model reflm-30m (default: {DEFAULT_REFERENCE_MODEL})",
    )
    parser.addoption(
        "--public-models",
        type=Path,
        default=DEFAULT_PUBLIC_MODELS,
        metavar="DIR",
        help=f"where make test-public makes its folders (default: {DEFAULT_PUBLIC_MODELS})",
    )
    parser.addoption(
        "--feature-results",
        type=Path,
        metavar="FILE",
        help="write the outcome of every case of test_features.py here, as JSON",
    )


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Leaves what tools/feature_table.py reads."""
    path = config.getoption("--feature-results")
    if path is None:
        return
    outcomes = {}
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            case = re.search(r"test_feature\[(.+)\]$", report.nodeid)
            if case is not None and outcomes.get(case[1]) != "failed":
                outcomes[case[1]] = outcome
    path.write_text(json.dumps(outcomes, indent=1) + "\n")


@pytest.fixture(autouse=True)
def own_user_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """Plans in the cache of who runs the tests must not change them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def reference_model(request: pytest.FixtureRequest) -> Path:
    """The folder of reflm-30m; skips where it is not."""
    folder: Path = request.config.getoption("--reference-model")
    if not (folder / "config.json").is_file():
        pytest.skip(f"no model in {folder}; give its folder with --reference-model DIR")
    return folder


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> Path:
    """The folder of SmolLM2-135M-Instruct; skips where it is not."""
    return public_folder(request, "SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def gemma3(request: pytest.FixtureRequest) -> Path:
    """The folder of Gemma-3-270M; skips where it is not."""
    return public_folder(request, "gemma-3-270m")


def public_folder(request: pytest.FixtureRequest, name: str) -> Path:
    folder: Path = request.config.getoption("--public-models") / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"no {folder}: run `make test-public`, or give --public-models DIR")
    return folder


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of the packaged demo model."""
    import tidaldecode

    return Path(tidaldecode.__file__).parent / "models" / "tidal-demo"


@pytest.fixture(scope="session")
def installed() -> importlib.metadata.Distribution:
    """The installed package, if it is the one that is tested; skips where that is the tree."""
    import tidaldecode

    here = Path(tidaldecode.__file__).resolve()
    for found in importlib.metadata.distributions(name="tidaldecode"):
        if any(Path(found.locate_file(f)).resolve() == here for f in found.files or ()):
            return found
    pytest.skip("this tree is not installed: run `make test`")
