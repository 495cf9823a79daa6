"""Quantised checkpoints beside the compressed-tensors library, which transformers reads them with.

What the tests of formats take from their descriptions (quantized_models.py), another's code decodes
here. Only where the library is installed, as `make conformance` does.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest

import tidaldecode
from quantized_models import KINDS, Kind, Tensors, dequantize, quantize, write_quantized
from tiny_models import TinyModel, random_prompt

pytest.importorskip("compressed_tensors")
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

pytestmark = pytest.mark.conformance

TINY = TinyModel(hidden_size=128, intermediate_size=384, num_layers=2, head_dim=32, dtype="float32")
COMPRESSED = [kind for kind in KINDS if kind.config["quant_method"] == "compressed-tensors"]
# That transformers 5.17 loads without rounding inputs: int8 it packs anew, and of zero points it
# expects one for each row.
LOADED = [kind for kind in COMPRESSED if kind.codes != "int8" and not kind.zeros]
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


def group_of(kind: Kind) -> dict:
    return kind.config["config_groups"]["group_0"]


def to_torch(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(np.array(bits)).view(DTYPES[dtype])
        for name, (dtype, bits) in tensors.items()
    }


@pytest.mark.parametrize("shape", [(96, 384), (40, 128)])
@pytest.mark.parametrize("kind", COMPRESSED, ids=lambda kind: kind.name)
def test_the_library_decodes_a_matrix_to_the_same_numbers(kind: Kind, shape: tuple[int, int]):
    weight = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    tensors = quantize(weight, kind)
    stored = to_torch(tensors)
    stored["weight_scale"] = stored["weight_scale"].float()  # in which it multiplies
    compressor = BaseCompressor.get_value_from_registry(kind.config["format"])
    decoded = compressor.decompress(stored, QuantizationScheme.model_validate(group_of(kind)))
    np.testing.assert_array_equal(decoded["weight"].float().numpy(), dequantize(tensors, kind))


@pytest.mark.parametrize("kind", LOADED, ids=lambda kind: kind.name)
def test_logits_are_those_of_transformers(tmp_path: Path, kind: Kind):
    from transformers import AutoModelForCausalLM

    kind = dataclasses.replace(kind, config=copy.deepcopy(kind.config), extra={})
    group_of(kind)["input_activations"] = None
    folder = write_quantized(tmp_path / "model", TINY, kind)
    prompt = random_prompt(TINY, 24)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0].numpy()
    for weight_format in ("auto", "decoded"):
        options = {"device": "cpu", "dtype": "float32", "weight_format": weight_format}
        with tidaldecode.Decoder(folder, max_seq_len=64, max_batch_size=1, **options) as decoder:
            logits = decoder.logits(prompt, last=len(prompt))
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
