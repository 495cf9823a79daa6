"""The soak (tests/soak): a short one, and that it sees what it is there for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import tidaldecode

SOAK = Path(__file__).resolve().parents[1] / "soak"
sys.path.insert(0, str(SOAK))

from calls import VARIANTS, generate_ids  # noqa: E402
from soak import MAX_GROWTH_BYTES, Resources, Soak, report  # noqa: E402


@pytest.mark.slow
def test_two_thousand_calls_leave_nothing_behind():
    process = subprocess.run(
        [sys.executable, str(SOAK / "soak.py"), "--calls", "2000", "--deadline", "400"],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    assert "2,000 calls (after 200 to warm up) from 8 threads" in process.stdout
    assert process.stdout.rstrip().endswith("all well")


@pytest.fixture(scope="module")
def decoder():
    folder = tidaldecode.demo_model_dir()
    with tidaldecode.Decoder(folder, device="cpu", num_threads=1, max_seq_len=256) as decoder:
        yield decoder


def failures(decoder, call, num_calls: int = 12) -> list[str]:
    """What a soak of one kind of call complains of, known answers being those of generate_ids."""
    soak = Soak(decoder, (generate_ids,), seed=0)
    soak.learn()
    call.__name__ = "generate_ids"
    soak.calls = (call,)
    soak.run(2, 2)
    start = Resources.now(decoder)
    soak.run(num_calls, 4)
    return report(soak, start, Resources.now(decoder))


def test_its_own_threads_are_gone_when_it_ends(decoder):
    soak, before = Soak(decoder, (), seed=0), set(os.listdir("/proc/self/task"))
    for _ in range(200):
        soak.run(0, 8)
        assert set(os.listdir("/proc/self/task")) <= before


def test_right_answers_are_no_failure(decoder):
    assert failures(decoder, lambda d, variant: generate_ids(d, variant)) == []


def test_a_wrong_answer_is_a_failure(decoder):
    found = failures(decoder, lambda d, variant: generate_ids(d, (variant + 1) % VARIANTS))
    assert len(found) == 2 + 12 + 1 and "expected" in found[0]


def test_an_error_is_a_failure_unless_it_is_for_room(decoder):
    def untyped(*_):
        raise KeyError("x")

    assert "UNTYPED" in failures(decoder, untyped)[0]

    def typed(*_):
        raise tidaldecode.InvalidArgument("x")

    assert ": typed:" in failures(decoder, typed)[0]

    def full(*_):
        raise tidaldecode.CapacityError("x")

    assert failures(decoder, full) == ["generate_ids: none of its calls was answered"]


def test_what_is_kept_is_a_failure(decoder):
    kept: list[object] = []

    def leak(what):
        def call(decoder, variant):
            kept.append(what())
            return generate_ids(decoder, variant)

        return call

    def page():
        session = decoder.session()
        session.append(list(range(3, 40)))
        return session

    def thread():
        waiting = threading.Thread(target=release.wait)
        waiting.start()
        return waiting

    def process():
        return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    release = threading.Event()
    found = failures(decoder, leak(lambda: os.open(os.devnull, os.O_RDONLY)))
    assert found[0].startswith("files: ")
    for descriptor in kept:
        os.close(descriptor)
    kept.clear()
    assert failures(decoder, leak(page), 2)[0].startswith("free_pages: ")
    for session in kept:
        session.close()
    kept.clear()
    assert failures(decoder, leak(thread))[0].startswith("threads: ")
    release.set()
    kept.clear()
    # Pieces too large for what earlier tests have freed and the allocator has kept.
    found = failures(decoder, leak(lambda: b"x" * MAX_GROWTH_BYTES), 4)
    assert found[0].startswith("memory: grew by ")
    kept.clear()
    assert any(f.startswith("children: ") for f in failures(decoder, leak(process), 1))
    for child in kept:
        child.communicate(b"\n")
