"""A feature that has not run on a device does not exist there.

Every public name and every command (feature_runs.py) is used on the CPU, and on CUDA in both of its
dtypes. The names are found by looking at the package, so that a new one without a run is an error.
What ran where is a table in tests/README.md, which tools/feature_table.py makes from the results of
`make gpu-test`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

import checkpoint_runs  # noqa: F401  adds its runs
import feature_runs
import request_runs  # noqa: F401  adds its runs
import server_runs  # noqa: F401  adds its runs
import tidaldecode
from feature_runs import NAMES, RUNS, Bench
from tidaldecode import _core
from tidaldecode.cli import app
from tidaldecode.replay import Replay

TABLE = Path(__file__).resolve().parents[1] / "README.md"


def has_cuda() -> bool:
    return any(d["available"] and d["name"].startswith("cuda") for d in _core.list_devices())


def column(device: str, dtype: str) -> object:
    marks = []
    if device == "cuda":
        marks = [pytest.mark.gpu, pytest.mark.skipif(not has_cuda(), reason="no CUDA device")]
    return pytest.param((device, dtype), id=f"{device} {dtype}", marks=marks)


COLUMNS = [column("cpu", "float32"), column("cuda", "bfloat16"), column("cuda", "float16")]


@pytest.fixture
def bench(request, tmp_path: Path, capsys, monkeypatch) -> Iterator[Bench]:
    device, dtype = request.param
    bench = Bench(
        device=device, dtype=dtype, folder=tmp_path, capsys=capsys, monkeypatch=monkeypatch
    )
    yield bench
    bench.close()


@pytest.mark.parametrize("bench", COLUMNS, indirect=True)
@pytest.mark.parametrize("name", RUNS)
def test_feature(name: str, bench: Bench):
    RUNS[name](bench)


def commands() -> dict[str, set[str]]:
    """The long options of every command; a short one stands for its long one."""
    group = typer.main.get_command(app.app)
    context = group.make_context("tidaldecode", ["info"], resilient_parsing=True)
    found = {}
    for name in group.list_commands(context):
        options = [
            option
            for parameter in group.get_command(context, name).params
            for option in (parameter.opts[:1] + parameter.secondary_opts[:1])
            if option.startswith("--") and option != "--help"
        ]
        found[f"tidaldecode {name}"] = set(options)
    return found


def public_names() -> set[str]:
    """What a user can name: the package's own names, the members of its classes, its commands."""
    names = set(commands())
    classes: dict[str, type] = {"Replay": Replay}
    for name in tidaldecode.__all__:
        value = getattr(tidaldecode, name)
        if inspect.isclass(value) and issubclass(value, BaseException):
            continue  # errors have tests of their own
        names.add(name)
        if inspect.isclass(value):
            classes[name] = value
    for name, cls in classes.items():
        own = [base for base in cls.__mro__ if base.__module__.startswith("tidaldecode")]
        if name == "DecodeConfig":
            own = own[:1]  # the rest is PlanConfig's
        for member, value in (pair for base in own for pair in vars(base).items()):
            if not member.startswith("_") and isinstance(value, (property, type(public_names))):
                names.add(f"{name}.{member}")
    return names


def test_every_public_name_has_a_run():
    missing = public_names() - set(NAMES)
    assert not missing, f"add runs to feature_runs.py: {sorted(missing)}"


def test_every_option_is_used():
    if not feature_runs.used_options:
        pytest.skip("no command has run: run the whole file")
    unused = {
        name: sorted(options - feature_runs.used_options.get(name.split()[1], set()))
        for name, options in commands().items()
    }
    assert not {name: options for name, options in unused.items() if options}


def test_the_table_names_every_feature():
    text = TABLE.read_text()
    table = text.split("<!-- features: begin -->")[1].split("<!-- features: end -->")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    assert listed == set(NAMES), "make the table anew: make gpu-test"
    for row in rows:
        on_cpu, *on_cuda = (cell.strip() for cell in row.split("|")[2:5])
        # A feature is new until the next run on a GPU, and the table says so.
        assert on_cpu == "yes" and {*on_cuda} in ({"yes"}, {"not run"}), row
