"""MXFP4, in which gpt-oss stores its experts: what numpy decodes, what transformers does, refusals;
that the codes are kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tidaldecode
from mxfp4_models import MXFP4, from_mxfp4, stored_and_meant, write_both_mxfp4
from quantized_models import Tensors, write_quantized
from reference_transformers import TRANSFORMERS
from test_quantized_checkpoints import assert_same, assert_same_bits, open_decoder
from tidaldecode import WeightsError
from tidaldecode.checkpoint.model_config import read_checkpoint_config
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.cli import app
from tidaldecode.plan_bytes import weight_bytes_per_step
from tiny_models import TinyModel, config_json, random_prompt, random_weights, write_checkpoint

TINY = TinyModel(family="gpt_oss", dtype="bfloat16", seed=50)  # hidden 64, intermediate 96
EXPERTS = "model.layers.0.mlp.experts."


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rope", ["default", "yarn"])
def test_the_bits_of_what_numpy_decodes(tmp_path: Path, dtype: str, rope: str):
    model = dataclasses.replace(TINY, dtype=dtype, rope=rope)
    one, other = write_both_mxfp4(tmp_path, model)
    assert_same(one, other, model, dtype=dtype)
    # In which all of it is exact, so that codes that are kept are the same numbers.
    assert_same_bits((one, {"dtype": dtype}), (other, {"dtype": dtype}), model)


def test_every_code_under_scales_far_apart(tmp_path: Path):
    """All 256 bytes lie in one matrix; 2^-127 and what it makes of a code are subnormal."""
    stored, meant = stored_and_meant(TINY)
    name = f"{EXPERTS}gate_up_proj"
    blocks, scales = stored[f"{name}_blocks"][1], stored[f"{name}_scales"][1]
    blocks[:] = np.resize(np.arange(256, dtype=np.uint8), blocks.shape)
    scales[:] = np.resize(np.array([0, 1, 100, 120, 127, 128], np.uint8), scales.shape)
    meant[name] = from_mxfp4(blocks, scales).swapaxes(1, 2)
    assert meant[name].max() == 12 and np.abs(meant[name][meant[name] != 0]).min() == 2.0**-128
    one = write_quantized(tmp_path / "one", TINY, MXFP4, stored)
    assert_same(one, write_checkpoint(tmp_path / "other", TINY, meant), TINY, dtype="bfloat16")


def test_as_transformers_decodes_it(tmp_path: Path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion=TRANSFORMERS)
    folder, _ = write_both_mxfp4(tmp_path, TINY)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    ).eval()  # fmt: skip
    prompt = random_prompt(TINY, 90)
    with torch.no_grad():
        expected = reference(torch.tensor([prompt])).logits[0].numpy()
    with open_decoder(folder, dtype="float32", kv_dtype="float32", max_seq_len=128) as decoder:
        logits = decoder.logits(prompt, last=len(prompt))
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_folder_says_what_it_stores(tmp_path: Path, capsys):
    one, other = map(read_model_folder, write_both_mxfp4(tmp_path, TINY))
    matrices = 3 * 6 * 64 * 96 * TINY.num_layers  # numbers of all experts
    assert other.weight_bytes - one.weight_bytes == round((2 - 17 / 32) * matrices)
    assert one.decoded_bytes == other.weight_bytes
    # Two of six experts are read a token.
    steps = [weight_bytes_per_step(folder) for folder in (one, other)]
    assert steps[1] - steps[0] == round((2 - 17 / 32) * matrices / 3)
    assert app.main(["info", str(one.path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "mxfp4: MXFP4, groups of 32; FP8, int4 and MXFP4 are kept so" in text
    assert "4 have 6 experts of 96, 2 a token" in text


def test_the_memory_plan_is_of_the_codes(tmp_path: Path):
    one, other = write_both_mxfp4(tmp_path, TINY)

    def weight_bytes(folder: Path, **options: Any) -> int:
        plan = tidaldecode.plan_memory(folder, device="cpu", max_seq_len=64, **options)
        return plan.weight_bytes

    matrices = 3 * 6 * 64 * 96 * TINY.num_layers
    assert weight_bytes(other) - weight_bytes(one) == (2 - 17 / 32) * matrices
    assert weight_bytes(one, weight_format="decoded") == weight_bytes(other)


def test_the_config_of_the_public_models_is_read(tmp_path: Path):
    config = {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
        "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
        "quantization_config": MXFP4.config, "rms_norm_eps": 1e-05, "rope_theta": 150000,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
            "original_max_position_embeddings": 4096, "truncate": False,
        },
        "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": False, "vocab_size": 201088,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    whole = read_checkpoint_config(path)
    model = whole.model
    assert not whole.notes and whole.quantization.method == "mxfp4"
    assert (model.num_experts, model.experts_per_token, model.expert_intermediate_size) == (
        32, 4, 2880,
    )  # fmt: skip
    assert (model.activation, model.swiglu_limit, model.swiglu_alpha) == (
        "clamped_swiglu", 7.0, 1.702,
    )  # fmt: skip
    assert model.windows == (128, 0) * 12 and model.normalized_routing
    assert (model.rope.type, model.rope.factor, model.rope.truncate) == ("yarn", 32.0, False)
    # What may be left out means the same.
    for key in ("rope_scaling", "rope_theta", "layer_types", "swiglu_limit", "attention_bias"):
        del config[key]
    path.write_text(json.dumps(config))
    assert read_checkpoint_config(path).model == model


# Damaged folders


def other_shape(part: str, *shape: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[EXPERTS + part] = ("U8", np.zeros(shape, np.uint8))

    return change


def without(part: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(EXPERTS + part) and None


def of_type(part: str, dtype: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[EXPERTS + part] = (dtype, tensors[EXPERTS + part][1])

    return change


def nan_scale(tensors: Tensors) -> None:
    tensors[f"{EXPERTS}down_proj_scales"][1][3, 5, 1] = 255


def plain_beside(tensors: Tensors) -> None:
    tensors[f"{EXPERTS}down_proj"] = ("BF16", np.zeros((6, 96, 64), np.uint16))


DAMAGE = {
    "no scales": (without("gate_up_proj_scales"), r"gate_up_proj_scales' is missing beside it"),
    "no codes": (without("down_proj_blocks"), r"down_proj_blocks' is missing beside it"),
    "neither bias": (without("down_proj_bias"), r"tensors are missing: .*down_proj.bias"),
    "an expert too few": (other_shape("down_proj_blocks", 5, 64, 3, 16),
                          r"down_proj_blocks': shape \[5, 64, 3, 16\], expected \[6, 64, 3, 16\]"),
    "rows too few": (other_shape("gate_up_proj_blocks", 6, 96, 2, 16),
                     r"shape \[6, 96, 2, 16\], expected \[6, 192, 2, 16\]"),
    "short blocks": (other_shape("gate_up_proj_blocks", 6, 192, 2, 8),
                     r"shape \[6, 192, 2, 8\], expected \[6, 192, 2, 16\]"),
    "groups too few": (other_shape("down_proj_scales", 6, 64, 2), r"expected \[6, 64, 3\]"),
    "codes of another type": (of_type("down_proj_blocks", "I8"),
                              r"down_proj_blocks\[0, 0::1\]': dtype I8, expected U8"),
    "scales of another type": (of_type("gate_up_proj_scales", "F8_E8M0"),
                               r"gate_up_proj_scales\[0, 0::2\]': dtype F8_E8M0, expected U8"),
    "a scale that is none": (nan_scale, r"down_proj_scales\[3, 0::1\]: holds nan, expected finite"),
    "numbers beside codes": (plain_beside, r"no part of a matrix stored as MXFP4, groups of 32"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_parts_are_named(tmp_path: Path, change: Callable[[Tensors], None], message: str):
    stored, _ = stored_and_meant(TINY)
    change(stored)
    folder = write_quantized(tmp_path, TINY, MXFP4, stored)
    with pytest.raises(WeightsError, match=message):
        open_decoder(folder)


def test_a_config_that_does_not_say_so_is_refused(tmp_path: Path):
    stored, _ = stored_and_meant(TINY)
    folder = write_quantized(tmp_path, TINY, MXFP4, stored, quantization_config=None)
    with pytest.raises(WeightsError, match=r"_blocks\[0, 0::2\].*has no quantization_config"):
        read_model_folder(folder)
    config = MXFP4.config | {"modules_to_not_convert": ["model.layers.*.mlp"]}
    write_quantized(tmp_path, TINY, MXFP4, stored, quantization_config=config)
    with pytest.raises(WeightsError, match=r"leaves 'model.layers.0.mlp.experts' out"):
        read_model_folder(folder)


def test_columns_that_make_no_blocks_are_refused(tmp_path: Path):
    model = dataclasses.replace(TINY, hidden_size=80)
    stored, _ = stored_and_meant(TINY)
    folder = write_quantized(tmp_path, model, MXFP4, stored)
    with pytest.raises(WeightsError, match=r"of 80 columns in MXFP4, expected a multiple of 32"):
        read_model_folder(folder)


def test_numbers_of_another_shape_are_refused(tmp_path: Path):
    weights = random_weights(TINY)
    name = f"{EXPERTS}gate_up_proj"
    weights[name] = weights[name].swapaxes(1, 2)
    folder = write_checkpoint(tmp_path, TINY, weights)
    with pytest.raises(
        WeightsError,
        match=r"gate_up_proj': shape \[6, 192, 64\], expected \[6, 64, 192\] \(6 experts",
    ):
        read_model_folder(folder)


def test_random_weights_need_no_files(tmp_path: Path):
    (tmp_path / "config.json").write_text(
        json.dumps(config_json(TINY) | {"quantization_config": MXFP4.config})
    )
    with open_decoder(tmp_path, load_format="dummy") as decoder:
        assert len(decoder.generate([5, 6], max_new_tokens=2, ignore_eos=True).token_ids) == 2
