"""The memory plan: what Decoder holds is what plan_memory and `tidaldecode info` say beforehand."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

import tidaldecode
from tidaldecode import Decoder, MemoryPlan
from tidaldecode.cli import app as cli
from tiny_models import TinyModel, random_prompt, write_checkpoint

MODEL = TinyModel(num_layers=4)
OPTIONS = {"device": "cpu", "max_seq_len": 512, "max_batch_size": 2}
TIDAL = {"select_layers": (2,), "token_budget": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plan"), MODEL)


@pytest.mark.parametrize(
    "options", [{"attention": "full"}, TIDAL, TIDAL | {"verify": True}, {"max_seq_len": None}],
    ids=["dense", "tidal", "verify", "automatic length"],
)  # fmt: skip
def test_the_plan_without_loading_is_the_decoders(folder: Path, options):
    options = OPTIONS | options
    planned = tidaldecode.plan_memory(folder, **options)
    with Decoder(folder, **options) as decoder:
        held = decoder.memory_plan()
        assert held.num_pages == decoder.config.num_pages
        assert held.max_seq_len == decoder.config.max_seq_len
    ignored = {"free_bytes": 0, "usable_bytes": 0}  # of a machine in use
    assert dataclasses.replace(planned, **ignored) == dataclasses.replace(held, **ignored)
    assert planned.problem == ""


def test_sizes_are_those_worked_out_by_hand(folder: Path):
    plan = tidaldecode.plan_memory(folder, **OPTIONS, page_size=16)
    assert plan.weight_bytes == sum(
        path.stat().st_size - _header_bytes(path) for path in folder.glob("*.safetensors")
    )
    kv_bytes_per_token = 2 * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_dim * 4
    assert plan.kv_bytes == 2 * 512 * kv_bytes_per_token
    assert (plan.num_pages, plan.page_size, plan.num_tokens) == (64, 16, 1024)
    assert plan.total_bytes == plan.weight_bytes + plan.kv_bytes + plan.scratch_bytes
    assert plan.device == "cpu" and plan.total_bytes <= plan.usable_bytes <= plan.free_bytes


def _header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_every_purpose_is_named_once(folder: Path):
    dense = tidaldecode.plan_memory(folder, **OPTIONS, attention="full")
    verifying = tidaldecode.plan_memory(folder, **OPTIONS, **TIDAL, verify=True)
    assert "selection" not in dense.scratch and "verification" not in dense.scratch
    assert {"selection", "verification", "sampling", "activations of a step"} <= set(
        verifying.scratch
    )
    text = str(verifying)
    for word in ("Memory on cpu", "max_seq_len 512", "weights", "KV cache", "total", "usable"):
        assert word in text
    for purpose in verifying.scratch:
        assert text.count(f"  {purpose} ") == 1


def test_config_json_is_enough(folder: Path, tmp_path: Path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    plan = tidaldecode.plan_memory(tmp_path, **OPTIONS, load_format="dummy", dtype="float32")
    assert plan.weight_bytes == tidaldecode.plan_memory(folder, **OPTIONS).weight_bytes


class TestTooMuch:
    OPTIONS = OPTIONS | {"max_seq_len": 2**31 - 1}

    def test_is_known_before_the_weights_are_read(self, folder: Path):
        seen = []
        with pytest.raises(tidaldecode.OutOfMemoryError) as caught:
            Decoder(folder, **self.OPTIONS, progress=lambda *p: seen.append(p))
        assert seen == []
        for words in ("need ", "have ", "max_seq_len 2147483647", "lower max_seq_len to "):
            assert words in str(caught.value)

    def test_is_a_plan_with_a_problem(self, folder: Path):
        plan = tidaldecode.plan_memory(folder, **self.OPTIONS)
        assert "lower max_seq_len to " in plan.problem
        assert plan.total_bytes > plan.usable_bytes
        assert "It does not fit. memory: need " in str(plan)

    def test_a_share_too_small_names_itself(self, folder: Path):
        with pytest.raises(tidaldecode.OutOfMemoryError, match="raise gpu_memory_utilization"):
            Decoder(folder, **OPTIONS, gpu_memory_utilization=1e-9)


@pytest.mark.parametrize("share", [0, -1, 1.5, float("nan"), True, "0.9"])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(tidaldecode.ConfigError, match="gpu_memory_utilization.*expected"):
        tidaldecode.DecodeConfig(gpu_memory_utilization=share)


def test_the_share_bounds_the_cache(folder: Path):
    whole = tidaldecode.plan_memory(folder, **OPTIONS | {"max_batch_size": 60000})
    half = tidaldecode.plan_memory(
        folder, **OPTIONS | {"max_batch_size": 60000}, gpu_memory_utilization=0.45
    )
    assert half.usable_bytes < 0.6 * whole.usable_bytes
    assert half.total_bytes <= half.usable_bytes and half.num_pages < whole.num_pages


def test_a_plan_is_held_and_cannot_be_changed(folder: Path):
    with Decoder(folder, **OPTIONS, **TIDAL, verify=True) as decoder:
        before = decoder.memory_plan()
        decoder.generate([random_prompt(MODEL, 100)] * 2, max_new_tokens=40, ignore_eos=True)
        assert decoder.memory_plan() == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.kv_bytes = 0  # type: ignore[misc]


class TestInfo:
    def run(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
        logging.getLogger("tidaldecode").setLevel(logging.ERROR)
        try:
            code = cli.main(["info", *arguments])
        finally:
            logging.getLogger("tidaldecode").setLevel(logging.NOTSET)
        return code, " ".join(capsys.readouterr().out.split())

    def test_shows_the_plan(self, folder: Path, capsys):
        code, out = self.run(
            capsys, str(folder), "--device", "cpu", "--max-seq-len", "512", "--max-batch-size", "3",
            "--select-layers", "2", "--token-budget", "16",
        )  # fmt: skip
        plan = tidaldecode.plan_memory(
            folder, device="cpu", max_seq_len=512, max_batch_size=3, **TIDAL
        )
        assert code == 0
        assert "Memory on cpu, max_seq_len 512, max_batch_size 3" in out
        for label, value in plan.rows()[:-1]:  # free memory moves
            assert " ".join(f"{label} {value}".split()) in out

    def test_says_what_does_not_fit(self, folder: Path, capsys):
        code, out = self.run(capsys, str(folder), "--device", "cpu", "--max-seq-len", "2147483647")
        assert code == 0
        assert "It does not fit. memory: need" in out and "lower max_seq_len to" in out


def test_the_plan_is_a_value_of_the_package():
    assert tidaldecode.MemoryPlan is MemoryPlan
