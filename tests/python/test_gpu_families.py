"""Every family on CUDA against the CPU backend: `pytest -m gpu`. As test_gpu.py, of small
models."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import test_families
from test_families import ONLY_WINDOWS
from test_gpu import BASE, TOLERANCE, cuda_is_missing, greedy, open_decoder, open_pair
from tidaldecode import UnsupportedError
from tiny_families import FAMILIES
from tiny_models import TinyModel, random_prompt, write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(cuda_is_missing()), reason=cuda_is_missing()),
]

EXPERTS = (
    "qwen3_moe", "mixtral", "gpt_oss", "qwen2_moe", "glm4_moe", "dots1", "ernie4_5_moe",
    "minimax_m2",
)  # fmt: skip
# Scores of this one are twice as large as others'.
TOLERANCES = {"granitemoehybrid": 2 * TOLERANCE["bfloat16"]}
# Families whose heads are of another size. The scale spreads their scores as BASE's.
_GEMMA: dict[str, Any] = {"head_dim": 256, "fields": {"query_pre_attn_scalar": 32}}
OTHER_HEADS: dict[str, dict[str, Any]] = {
    "gemma2": _GEMMA, "gemma3_text": _GEMMA, "mistral": {"head_dim": 80, "hidden_size": 1024},
    "phi3": {"head_dim": 96, "hidden_size": 768},
}  # fmt: skip
LENGTHS = (200, 33, 65, 1)
NEW_TOKENS = 32


def tiny(family: str) -> TinyModel:
    """As deep as on the CPU, and so wide that heads of 64 are those of every other family."""
    like = test_families.tiny(family)
    own: dict[str, Any] = {"hidden_size": 512, "rope_extra": like.rope_extra}
    own |= OTHER_HEADS.get(family, {})
    return dataclasses.replace(BASE, family=family, num_layers=like.num_layers, **own)


def plan(family: str) -> dict[str, Any]:
    return test_families.plan(family) | {"attention": "tidal", "token_budget": 48}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp(family), tiny(family))


@pytest.mark.parametrize(("family", "head_dim"), [("gemma2", 256), ("mistral", 80), ("phi3", 96)])
def test_other_heads_are_of_bfloat16(tmp_path: Path, family: str, head_dim: int):
    folder = write_checkpoint(tmp_path, tiny(family))
    with pytest.raises(UnsupportedError, match=f"head_dim {head_dim} in float16 .*=.bfloat16"):
        open_decoder(folder, "cuda", dtype="float16")


def tolerance(family: str) -> float:
    return TOLERANCES.get(family, TOLERANCE["bfloat16"])


def distances(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The largest distance at each position, relative to the largest logit."""
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max(-1) / np.abs(expected).max()


def assert_short_texts_are_near(cuda: Any, cpu: Any) -> None:
    """Where rounding decides between two experts it may decide otherwise, and all tokens behind
    are of another text: most short ones do not meet such a place."""
    prompts = [random_prompt(BASE, 12, seed=seed) for seed in range(24)]
    for run in (
        lambda decoder, prompt: decoder.logits(prompt, last=1),
        lambda decoder, prompt: decoder.step_logits(prompt, prefill=6)[-1:],
    ):
        away = [distances(run(cuda, prompt), run(cpu, prompt)).max() for prompt in prompts]
        assert np.mean(np.array(away) <= TOLERANCE["bfloat16"]) >= 0.7, np.sort(away)


def test_as_on_the_cpu(family: str, folder: Path):
    cuda, cpu = open_pair(folder, "bfloat16", max_batch_size=4)
    if family in EXPERTS:
        assert_short_texts_are_near(cuda, cpu)
        return
    prompts = [random_prompt(BASE, length, seed=length) for length in LENGTHS]
    for prompt in prompts:
        logits = cuda.logits(prompt, last=len(prompt))
        assert distances(logits, cpu.logits(prompt, last=len(prompt))).max() <= tolerance(family)
    for prompt, tokens in zip(prompts, greedy(cuda, prompts, NEW_TOKENS), strict=True):
        text = prompt + tokens
        steps = cuda.step_logits(text, prefill=len(prompt))
        away = distances(steps, cpu.step_logits(text, prefill=len(prompt)))
        assert away.max() <= tolerance(family)


def test_a_plan_as_on_the_cpu(family: str, folder: Path):
    if family in ONLY_WINDOWS:
        pytest.skip("has nothing to choose")
    cuda, cpu = open_pair(folder, "bfloat16", **plan(family))
    prompt = random_prompt(BASE, 200, seed=2)
    text = prompt + greedy(cuda, [prompt], NEW_TOKENS)[0]
    actual, expected = (d.step_logits(text, prefill=len(prompt)) for d in (cuda, cpu))
    # Where rounding decides which position is the last of a set, it may decide otherwise.
    assert np.median(distances(actual, expected)) <= tolerance(family)


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_graphs_equal_eager_bitwise(family: str, folder: Path, kv_dtype: str):
    own = {} if family in ONLY_WINDOWS else plan(family)
    text = random_prompt(BASE, 200)
    eager, graphs = (
        open_decoder(folder, "cuda", cuda_graphs=on, kv_dtype=kv_dtype, **own)
        for on in (False, True)
    )
    expected = eager.step_logits(text, prefill=60)
    for _ in range(2):  # the first run records, the second replays
        assert np.array_equal(graphs.step_logits(text, prefill=60), expected)


def test_verified_is_dense_and_rows_do_not_depend_on_each_other(family: str, folder: Path):
    prompts = [random_prompt(BASE, length, seed=length) for length in LENGTHS]
    options: dict[str, Any] = {"batch_invariant": True, "max_batch_size": 4}
    dense = open_decoder(folder, "cuda", **options)
    want = greedy(dense, prompts, NEW_TOKENS)
    assert [greedy(dense, [prompt], NEW_TOKENS)[0] for prompt in prompts] == want
    if family not in ONLY_WINDOWS:
        verified = open_decoder(folder, "cuda", verify=True, **options, **plan(family))
        assert greedy(verified, prompts, NEW_TOKENS) == want


@pytest.mark.parametrize("weight_format", ["fp8", "int4", "mxfp4"])
def test_codes_are_the_decoded_model_to_rounding(family: str, folder: Path, weight_format: str):
    if weight_format == "mxfp4" and family not in EXPERTS:
        pytest.skip("has no experts")
    cuda, cpu = open_pair(folder, "bfloat16", weight_format=weight_format)
    if family in EXPERTS:
        assert_short_texts_are_near(cuda, cpu)
        return
    prompt = random_prompt(BASE, 100, seed=7)
    logits = cuda.logits(prompt, last=len(prompt))
    assert distances(logits, cpu.logits(prompt, last=len(prompt))).max() <= tolerance(family)


def test_rounded_inputs_of_prompts_cost_what_they_cost_the_cpu(family: str, folder: Path):
    """What differs by rounding may round to another code, so that two devices are as far from each
    other as from the model whose inputs are not rounded (measured: 0.95 to 1.1 times as far). What
    is asked of both is that rounding costs the same; product by product the C++ tests compare."""
    if family in EXPERTS:
        pytest.skip("rounding decides between experts")
    if family == "phi3":
        pytest.skip("rows of 768 inputs, which is what a small model with heads of 96 has, are too "
                    "short for products of codes on CUDA")  # fmt: skip
    cuda, cpu = open_pair(folder, "bfloat16", weight_format="fp8", activation_format="fp8")
    assert cuda.config.activation_format == "fp8"
    plain = open_decoder(folder, "cpu", kv_dtype="bfloat16", weight_format="fp8")
    prompt = random_prompt(BASE, 100, seed=7)
    got, want, exact = (each.logits(prompt, last=len(prompt)) for each in (cuda, cpu, plain))
    cost, cost_of_cpu = (distances(each, exact).mean() for each in (got, want))
    assert 0.5 * cost_of_cpu < cost < 1.5 * cost_of_cpu
