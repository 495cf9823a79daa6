"""activation_format: products of prompts with fp8 weights round their inputs to fp8 too, all tokens
of a prompt and no others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import tidaldecode
from quantized_models import (
    KINDS,
    PER_TOKEN,
    Kind,
    compressed,
    packed_group,
    quantized_tensors,
    write_both,
    write_quantized,
)
from tidaldecode.cli import app
from tidaldecode.errors import ConfigError, WeightsError
from tiny_models import TinyModel, random_prompt, write_checkpoint

MODEL = TinyModel(
    hidden_size=256, intermediate_size=384, num_layers=2, head_dim=32, dtype="float32"
)
DYNAMIC, STATIC, BLOCKS = KINDS[0], KINDS[1], KINDS[2]
EXACT = {"dtype": "float32", "kv_dtype": "float32"}
# Where two ways of adding up round to different codes, what follows differs by more than they do:
# by this share, at most, of what rounding to codes changes in all.
TO_ROUNDING = 0.25


def open_decoder(folder: Path, activation_format: str = "fp8", **options) -> tidaldecode.Decoder:
    limits = {"max_seq_len": 128, "max_batch_size": 2, "num_threads": 1, "device": "cpu"}
    return tidaldecode.Decoder(
        folder, activation_format=activation_format, **(limits | EXACT | options)
    )


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@contextmanager
def rounding(model, kind: Kind, num_rounded: int) -> Iterator[None]:
    """transformers' model with the inputs of its projections rounded, those of the first tokens."""
    torch = pytest.importorskip("torch")

    def round_inputs(module, inputs):
        (x,) = inputs
        rows, groups = x[:, :num_rounded], kind.block[1] or x.shape[-1]
        parts = rows.unflatten(-1, (-1, groups))
        scale = parts.abs().amax(-1, keepdim=True) / 448
        if kind is STATIC:
            scale = torch.tensor(0.5)
        codes = (parts / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        return (torch.cat([(codes * scale).flatten(-2), x[:, num_rounded:]], dim=1),)

    hooks = [
        module.register_forward_pre_hook(round_inputs)
        for name, module in model.named_modules()
        if name.endswith("_proj")
    ]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", [DYNAMIC, STATIC, BLOCKS, KINDS[4]], ids=lambda kind: kind.name)
def test_prompts_are_rounded_as_the_checkpoint_says_and_steps_are_not(tmp_path: Path, kind: Kind):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    stored, plain = write_both(tmp_path, MODEL, kind)
    reference = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    ids, prefill = random_prompt(MODEL, 40), 25

    def want(num_rounded: int) -> np.ndarray:
        with torch.inference_mode(), rounding(reference, kind, num_rounded):
            return reference(torch.tensor([ids])).logits[0].numpy()

    with open_decoder(stored) as decoder, open_decoder(stored, "16bit") as plain_decoder:
        assert decoder.config.activation_format == "fp8"
        assert error(plain_decoder.logits(ids, last=len(ids)), want(0)) < 1e-5
        size = error(want(len(ids)), want(0))
        assert size > 1e-2
        assert error(decoder.logits(ids, last=len(ids)), want(len(ids))) < TO_ROUNDING * size
        steps, rows = decoder.step_logits(ids, prefill), slice(prefill - 1, None)
        size = error(want(prefill)[rows], want(len(ids))[rows])
        assert error(steps, want(prefill)[rows]) < TO_ROUNDING * size


@pytest.mark.parametrize("kind", [DYNAMIC, BLOCKS], ids=lambda kind: kind.name)
def test_chunks_of_any_length_give_the_same(tmp_path: Path, kind: Kind):
    stored, _ = write_both(tmp_path, MODEL, kind)
    ids = random_prompt(MODEL, 100)
    logits = {}
    for chunk in (1, 7, 64, 100):
        with open_decoder(stored, prefill_chunk=chunk) as decoder:
            logits[chunk] = decoder.logits(ids, last=len(ids))
    with open_decoder(stored, "16bit") as decoder:
        size = error(decoder.logits(ids, last=len(ids)), logits[1])
    assert np.array_equal(logits[1], logits[7])
    assert max(error(each, logits[1]) for each in logits.values()) < TO_ROUNDING * size


def test_auto_is_what_the_device_gains_by(tmp_path: Path):
    """On a CPU nothing; what CUDA does is in test_gpu_families.py."""
    stored, _ = write_both(tmp_path, MODEL, DYNAMIC)
    ids = random_prompt(MODEL, 30)
    with open_decoder(stored, "auto") as automatic, open_decoder(stored, "16bit") as plain:
        assert automatic.config.activation_format == "16bit"
        assert np.array_equal(automatic.logits(ids), plain.logits(ids))


@pytest.mark.parametrize("dummy", [False, True], ids=["files", "dummy"])
def test_weights_that_were_rounded_while_loading_have_it_too(tmp_path: Path, dummy: bool):
    folder = write_checkpoint(tmp_path, MODEL)
    load_format = "dummy" if dummy else "auto"
    ids = random_prompt(MODEL, 30)
    with (
        open_decoder(folder, weight_format="fp8", load_format=load_format) as rounded,
        open_decoder(folder, "auto", weight_format="fp8", load_format=load_format) as plain,
    ):
        assert (rounded.config.activation_format, plain.config.activation_format) == (
            "fp8",
            "16bit",
        )
        assert 5e-3 < error(rounded.logits(ids), plain.logits(ids)) < 0.3


@pytest.mark.parametrize("weight_format", ["auto", "int4", "decoded"])
def test_without_fp8_weights_it_is_refused(tmp_path: Path, weight_format: str):
    folder = write_checkpoint(tmp_path, MODEL)
    with pytest.raises(ConfigError, match=r"activation_format: got \"fp8\", but no matrix .* cpu"):
        open_decoder(folder, weight_format=weight_format)
    stored, _ = write_both(tmp_path / "int4", MODEL, packed_group(32, True))
    with pytest.raises(ConfigError, match='weight_format "fp8", an fp8 checkpoint, or a GPU'):
        open_decoder(stored)


def test_the_memory_plan_counts_rounded_inputs(tmp_path: Path):
    stored, _ = write_both(tmp_path, MODEL, DYNAMIC)
    options = {"device": "cpu", "max_seq_len": 128, "prefill_chunk": 64, "num_threads": 1}
    plans = {
        choice: tidaldecode.plan_memory(stored, activation_format=choice, **options)
        for choice in ("16bit", "fp8")
    }
    added = plans["fp8"].scratch_bytes - plans["16bit"].scratch_bytes
    assert added == 4 * 64 * max(MODEL.hidden_size, MODEL.intermediate_size)
    with tidaldecode.Decoder(stored, activation_format="fp8", **options) as decoder:
        decoder.logits(random_prompt(MODEL, 100))
        assert decoder.memory_plan().scratch_bytes == plans["fp8"].scratch_bytes


def test_what_was_decoded_is_not_found_as_if_it_had_been_read(tmp_path: Path):
    stored, _ = write_both(tmp_path, MODEL, DYNAMIC)
    ids = random_prompt(MODEL, 24)
    cached = {}
    for choice in ("16bit", "fp8"):
        with open_decoder(stored, choice, page_size=8) as decoder:
            text = [*ids, *decoder.generate(ids, max_new_tokens=24, ignore_eos=True).token_ids]
            again = decoder.generate(text, max_new_tokens=1, ignore_eos=True)
            cached[choice] = again.cached_tokens
            with open_decoder(stored, choice, prefix_cache=False) as fresh:
                want = fresh.generate(text, max_new_tokens=1, ignore_eos=True, logprobs=0)
                got = decoder.generate(text, max_new_tokens=1, ignore_eos=True, logprobs=0)
                assert got.logprobs[0].logprob == pytest.approx(want.logprobs[0].logprob, abs=0.1)
    assert cached == {"16bit": 40, "fp8": 24}


def test_verified_decoding_is_dense_decoding(tmp_path: Path):
    stored, _ = write_both(tmp_path, dataclasses.replace(MODEL, num_layers=4), DYNAMIC)
    ids = random_prompt(MODEL, 40)
    plan = {"select_layers": (2,), "token_budget": 16, "sparse_min_context": 0}
    with (
        open_decoder(stored) as dense,
        open_decoder(stored, verify=True, draft_tokens=4, **plan) as verified,
    ):
        texts = [d.generate(ids, max_new_tokens=40, ignore_eos=True) for d in (dense, verified)]
        assert texts[0].token_ids == texts[1].token_ids
        assert texts[1].verification.drafted_tokens > 0


@pytest.mark.parametrize(
    ("value", "problem"),
    [(0.0, "expected one above 0"), (-1.0, "expected one above 0"), (np.nan, "finite scales")],
)
def test_a_scale_of_inputs_that_is_none_is_refused(tmp_path: Path, value: float, problem: str):
    scale = ("F32", np.float32(value).reshape(1).view(np.uint32))
    kind = dataclasses.replace(STATIC, extra={"input_scale": scale})
    stored, _ = write_both(tmp_path, MODEL, kind)
    with pytest.raises(WeightsError, match=f"input_scale: holds .*{problem}"):
        open_decoder(stored)
    with open_decoder(stored, "16bit"):  # which does not need it
        pass


def test_scales_for_each_input_are_refused(tmp_path: Path):
    scale = ("F32", np.ones(3, np.float32).view(np.uint32))
    kind = dataclasses.replace(STATIC, extra={"input_scale": scale})
    stored, _ = quantized_tensors(MODEL, kind)
    folder = write_quantized(tmp_path, MODEL, kind, stored)
    with pytest.raises(WeightsError, match=r"input_scale'?: shape \[3\], expected one number"):
        open_decoder(folder, "16bit")


def test_info_says_what_becomes_of_activations(tmp_path: Path, capsys):
    def said(kind: Kind, name: str) -> str:
        assert app.main(["info", str(write_quantized(tmp_path / name, MODEL, kind))]) == 0
        return " ".join(capsys.readouterr().out.split())

    on = "activations of prompts are quantised to FP8 as well, as it says, on GPUs"
    assert on in said(DYNAMIC, "dynamic")
    assert on in said(KINDS[4], "blocks")
    int8 = next(kind for kind in KINDS if kind.name == "int8 per channel")
    assert "activations are not quantised" in said(int8, "int8")
    # Codes of 8 bits, but of integers.
    weights = DYNAMIC.config["config_groups"]["group_0"]["weights"]
    inputs = PER_TOKEN | {"type": "int"}
    other = dataclasses.replace(DYNAMIC, config=compressed(weights, "float-quantized", inputs))
    assert "activations are not quantised" in said(other, "other")


def test_activations_that_are_no_object_are_refused(tmp_path: Path):
    config = json.loads(json.dumps(DYNAMIC.config))
    config["config_groups"]["group_0"]["input_activations"] = "dynamic"
    folder = write_quantized(tmp_path, MODEL, dataclasses.replace(DYNAMIC, config=config))
    with pytest.raises(ConfigError, match="input_activations: got 'dynamic', expected an object"):
        open_decoder(folder)
