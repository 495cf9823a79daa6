"""The search for faults (tests/fuzz): it sees every kind, repeats itself and misses no name."""

from __future__ import annotations

import inspect
import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parents[1] / "fuzz"
sys.path.insert(0, str(FUZZ))

import api_surface  # noqa: E402
import api_values  # noqa: E402
import fuzz  # noqa: E402
import hostile_values  # noqa: E402
import json_mutations  # noqa: E402
import target_planted  # noqa: E402
import tidaldecode  # noqa: E402
from supervisor import Worker  # noqa: E402

EXPECTED = {"panic": "untyped", "exit": "crash"}  # where the outcome has not the kind's own name


@pytest.mark.parametrize("kind", target_planted.KINDS)
def test_a_planted_fault_is_seen_as_what_it_is(kind: str):
    limits = replace(target_planted.LIMITS, seconds=3.0 if kind == "hang" else 30.0)
    with Worker("target_planted", limits) as worker:
        outcome = worker.run({"kind": kind, "noise": 1})
        assert outcome.kind == EXPECTED.get(kind, kind), outcome
        assert outcome.is_fault == (kind not in ("ok", "refused", "usage", "caller"))
        assert worker.run({"kind": "ok", "noise": 1}).kind == "ok", "no worker after a fault"


def test_a_fault_is_counted_by_cause_and_made_smaller(monkeypatch):
    monkeypatch.setattr(target_planted, "KINDS", ("ok", "crash", "nonsense"))
    campaign = fuzz.Campaign("planted", seed=3)
    report = campaign.run(seconds=300.0, jobs=2, cases=16)
    assert set(report.outcomes) == {"ok", "crash", "nonsense"}
    assert sum(report.outcomes.values()) == report.cases
    assert {name.partition(":")[0] for name in report.faults} == {"crash", "nonsense"}
    for fault in report.faults.values():
        assert fault.case["noise"] == 0 and fault.reproducer.endswith(" 0")
    assert "nonsense: a NaN" in "\n".join(report.lines())
    assert json.loads(json.dumps(asdict(report)))["outcomes"] == report.outcomes


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_a_case_follows_from_seed_and_number_alone(target: str):
    first, again, other = (fuzz.Campaign(target, seed) for seed in (7, 7, 8))
    cases = [first.case(number) for number in range(20)]
    assert cases == [again.case(number) for number in reversed(range(20))][::-1]
    assert cases != [other.case(number) for number in range(20)]
    assert json.loads(json.dumps(cases)) == cases, "a case must survive its way to the worker"


def test_the_command_says_what_it_found():
    command = [sys.executable, str(FUZZ / "fuzz.py"), "plans", "--seed", "5", "--case", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode in (0, 1) and '"kind"' in done.stdout, done.stderr


def test_every_public_name_is_called():
    called = {call.name for call in api_surface.calls()}
    for name in tidaldecode.__all__:
        value = getattr(tidaldecode, name)
        if inspect.isfunction(value):
            assert name in called
    for kind in api_surface.public_classes():
        assert kind.__name__ in api_surface.RECEIVERS, f"RECEIVERS has no {kind.__name__}"
        methods = [name for name in vars(kind) if not name.startswith("_")]
        public = {f"{kind.__name__}.{name}" for name in methods if hasattr(kind, name)}
        plain = {name for name in public if name not in called}
        values = [getattr(kind, name.partition(".")[2]) for name in plain]
        # Defaults of dataclass fields are no calls.
        assert not any(callable(value) or isinstance(value, property) for value in values), plain


def test_every_parameter_has_a_right_value_to_start_from():
    names = {name for call in api_surface.calls() for name, _ in api_surface.parameters(call)}
    assert names - set(api_values.VALID) == set()


def test_the_values_are_expressions_that_can_be_read():
    more = {"model_dir": "m", "bare_dir": "b", "decoder": None}
    for text in (
        *hostile_values.NASTY,
        *(v for values in api_values.VALID.values() for v in values),
    ):
        hostile_values.evaluate(text, more)


def test_changes_of_json_do_what_they_say():
    document = {"a": [1, 2], "b": {"c": 3}}

    def changed(**change) -> str:
        return json_mutations.change_text(document, change)

    assert changed(do="set", path=["b", "c"], json="1e400") == '{"a": [1, 2], "b": {"c": 1e400}}'
    assert changed(do="delete", path=["a", 0]) == '{"a": [2], "b": {"c": 3}}'
    assert changed(do="duplicate", path=["a"]).count('"a": [1, 2]') == 2
    assert document == {"a": [1, 2], "b": {"c": 3}}


def test_mutations_can_be_applied_to_every_file(tmp_path: Path):
    for seed in range(300):
        rng = random.Random(seed)
        path = tmp_path / "config.json"
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_text('{"a": {"b": [1, 2, 3]}}')
        mutation = json_mutations.mutate(rng, {"config.json": {"a": {"b": [1]}}})
        json_mutations.apply(tmp_path, mutation)


@pytest.mark.parametrize("path", sorted(fuzz.CORPUS.glob("*.json")), ids=lambda path: path.stem)
def test_the_corpus_is_well_formed(path: Path):
    entry = json.loads(path.read_text())
    assert entry["target"] in fuzz.TARGETS and len(entry["why"]) > 10
    module = __import__(f"target_{entry['target']}")
    assert module.describe(entry["case"]) and module.group(entry["case"])
