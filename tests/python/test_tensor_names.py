"""Which stored tensors are the model's: as transformers decides, and what is refused by name."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from scripted_model import update_json
from tidaldecode import Decoder, WeightsError, plan_memory
from tidaldecode.checkpoint.model_folder import read_model_folder
from tiny_models import TinyModel, random_prompt, random_weights, write_checkpoint

TINY = TinyModel(num_layers=2)
TIED = TinyModel(num_layers=2, tie=True)
PROMPT = random_prompt(TINY, 12)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Tensors = dict[str, np.ndarray]


def write(folder: Path, tensors: Tensors, model: TinyModel = TINY) -> Path:
    write_checkpoint(folder, model)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def logits(folder: Path) -> np.ndarray:
    with Decoder(folder, device="cpu", attention="full", max_seq_len=64) as decoder:
        return decoder.logits(PROMPT)[-1]


def transformers_logits(folder: Path) -> np.ndarray:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0, -1].numpy()


def assert_as_transformers(folder: Path) -> None:
    expected = transformers_logits(folder)
    assert np.abs(logits(folder) - expected).max() <= 1e-4 * np.abs(expected).max()


def other_head() -> np.ndarray:
    return np.random.default_rng(9).normal(size=(TIED.vocab_size, 64)).astype(np.float32)


# An output matrix beside tied embeddings


def test_an_own_output_matrix_beside_tied_embeddings_is_used_and_said(tmp_path: Path, caplog):
    folder = write(tmp_path, random_weights(TIED) | {HEAD: other_head()}, TIED)
    assert not read_model_folder(folder).model.tie_word_embeddings
    with caplog.at_level(logging.WARNING, logger="tidaldecode"):
        assert_as_transformers(folder)
    assert "lm_head.weight differs from the embedding" in caplog.text
    tied = logits(write(tmp_path / "tied", random_weights(TIED), TIED))
    assert np.abs(logits(folder) - tied).max() > 0.1


def test_one_that_differs_in_its_last_value_is_used(tmp_path: Path):
    weights = random_weights(TIED)
    head = weights[EMBEDDING].copy()
    head[-1, -1] += 1
    assert not read_model_folder(
        write(tmp_path, weights | {HEAD: head}, TIED)
    ).model.tie_word_embeddings


def test_an_equal_copy_takes_no_memory(tmp_path: Path):
    weights = random_weights(TIED)
    folder = read_model_folder(write(tmp_path, weights | {HEAD: weights[EMBEDDING].copy()}, TIED))
    assert folder.model.tie_word_embeddings
    assert HEAD not in {entry.name for entry in folder.weights}
    assert not folder.notes
    assert_as_transformers(tmp_path)


def test_tied_embeddings_stored_as_the_output_matrix_alone_load(tmp_path: Path):
    weights = random_weights(TIED)
    weights[HEAD] = weights.pop(EMBEDDING)
    folder = write(tmp_path / "head", weights, TIED)
    assert_as_transformers(folder)
    assert np.array_equal(
        logits(folder), logits(write(tmp_path / "usual", random_weights(TIED), TIED))
    )


def test_a_plan_of_memory_counts_an_own_output_matrix(tmp_path: Path):
    tied = write(tmp_path / "tied", random_weights(TIED), TIED)
    own = write(tmp_path / "own", random_weights(TIED) | {HEAD: other_head()}, TIED)
    options = {"device": "cpu", "max_seq_len": 64, "attention": "full"}
    weights = [plan_memory(folder, **options).weight_bytes for folder in (tied, own)]
    assert weights[1] - weights[0] >= TIED.vocab_size * 64 * 4


# Names


@pytest.mark.parametrize("prefix", ["", "model.model."])
def test_names_that_transformers_finds_load(tmp_path: Path, prefix: str):
    renamed = {
        name.replace("model.", prefix, 1): value for name, value in random_weights(TINY).items()
    }
    assert_as_transformers(write(tmp_path, renamed))


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("module.model.", "module.lm_head.weight"),
        ("_orig_mod.model.", "_orig_mod.lm_head.weight"),
        ("transformer.", "lm_head.weight"),
    ],
)
def test_names_of_wrappers_load(tmp_path: Path, prefix: str, head: str):
    renamed = {
        head if name == HEAD else name.replace("model.", prefix, 1): value
        for name, value in random_weights(TINY).items()
    }
    vision = {
        "vision_tower.encoder.layers.0.layer_norm1.weight": np.ones(8, "f4"),
        "visual.layers.0.input_layernorm.weight": np.ones(8, "f4"),
    }
    folder = write(tmp_path / "renamed", renamed | vision)
    usual = write(tmp_path / "usual", random_weights(TINY))
    assert np.array_equal(logits(folder), logits(usual))


def test_the_usual_names_win_over_a_second_set(tmp_path: Path):
    weights = random_weights(TINY)
    averaged = {f"ema.{name}": value + 1 for name, value in weights.items()}
    folder = write(tmp_path / "both", weights | averaged)
    assert np.array_equal(logits(folder), logits(write(tmp_path / "one", weights)))
    assert any("does not use" in note for note in read_model_folder(folder).notes)


def test_two_sets_under_unusual_names_are_refused(tmp_path: Path):
    weights = random_weights(TINY)
    both = {f"{part}.{name}": value for part in ("a", "b") for name, value in weights.items()}
    with pytest.raises(WeightsError, match="several models: names begin with 'a.model.', 'b.model"):
        read_model_folder(write(tmp_path, both))


# What is left over

HARMLESS = [
    "v_head.summary.weight",
    "score.weight",
    "model.vision_tower.blocks.0.weight",
    "model.mtp_layers.0.norm.weight",
    "vision_adapter.proj.weight",
    "model.position_ids",
    "extra.7",
]
BUFFERS = [
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.layers.1.self_attn.rotary_emb.sin_cached",
    "model.rotary_emb.inv_freq",
    "model.layers.0.self_attn.masked_bias",
]


@pytest.mark.parametrize("name", HARMLESS)
def test_what_the_model_does_not_need_may_be_anything(tmp_path: Path, name: str):
    extra = {name: np.ones(3, np.int8)}
    folder = read_model_folder(write(tmp_path, random_weights(TINY) | extra))
    assert len(folder.weights) == len(random_weights(TINY))
    if name == "model.position_ids":
        assert not folder.notes
    else:
        (note,) = folder.notes
        assert f"does not use: '{name}'" in note


@pytest.mark.parametrize("name", BUFFERS)
def test_stored_tables_and_masks_are_passed_over(tmp_path: Path, name: str):
    folder = read_model_folder(write(tmp_path, random_weights(TINY) | {name: np.ones(8, "f4")}))
    assert not folder.notes
    assert name not in {entry.name for entry in folder.weights}


def test_one_note_names_a_few_of_many(tmp_path: Path):
    extra = {f"extra.{i}": np.ones(2, "f4") for i in range(9)}
    (note,) = read_model_folder(write(tmp_path, random_weights(TINY) | extra)).notes
    assert "'extra.0', " in note and "'extra.4' and 4 more" in note


def test_left_over_tensors_change_nothing(tmp_path: Path):
    extra = {name: np.ones(3, "f4") for name in HARMLESS + BUFFERS}
    assert_as_transformers(write(tmp_path, random_weights(TINY) | extra))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "no such biases .attention_bias"),
        ("model.layers.1.mlp.up_proj.bias", "no such biases"),
        ("model.layers.0.self_attn.q_norm.weight", "do not belong together"),
        ("model.layers.0.pre_feedforward_layernorm.weight", "do not belong together"),
        ("model.layers.0.mlp.experts.0.up_proj.weight", "do not belong together"),
        ("model.layers.0.self_attn.sinks", "do not belong together"),
        ("model.layers.0.self_attn.q_proj.weight_scale", "quantised"),
        ("model.layers.0.mlp.up_proj.qweight", "quantised"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "quantised"),
        ("lm_head.bias", "do not belong together"),
        ("model.norm.bias", "do not belong together"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "adapter.*merge"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight", "adapter"),
    ],
)  # fmt: skip
def test_what_would_change_a_layer_is_refused_by_name(tmp_path: Path, name: str, expected: str):
    extra = {name: np.ones(64, "f4")}
    with pytest.raises(WeightsError, match=expected) as error:
        read_model_folder(write(tmp_path, random_weights(TINY) | extra))
    assert name in str(error.value)


def test_quantised_weights_in_place_of_the_models_are_called_so(tmp_path: Path):
    weights = random_weights(TINY)
    for part in ("qweight", "qzeros", "scales"):
        weights[f"model.layers.0.mlp.up_proj.{part}"] = np.ones(3, np.int32)
    del weights["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(WeightsError, match="up_proj.qweight.*quantised weights are not supported"):
        read_model_folder(write(tmp_path, weights))


def test_fewer_layers_than_stored_are_used_and_said(tmp_path: Path):
    folder = write(tmp_path, random_weights(TinyModel(num_layers=4)))
    assert_as_transformers(folder)
    (note,) = read_model_folder(folder).notes
    assert "says 2 layers; those behind them are not used: 'model.layers.2." in note


def test_a_missing_output_matrix_asks_for_tied_embeddings(tmp_path: Path):
    folder = write(tmp_path, random_weights(TIED), TIED)
    update_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(WeightsError, match="missing: 'lm_head.weight'.*tie_word_embeddings"):
        read_model_folder(folder)
