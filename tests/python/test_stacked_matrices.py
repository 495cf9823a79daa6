"""Matrices that a checkpoint stores as one, the first above the second, in every format."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantized_models import KINDS, Kind, fp8_blocks, quantized_tensors, write_both, write_quantized
from scripted_model import update_json
from test_quantized_checkpoints import AWQ, DTYPES, FP8, GPTQ, INT4, TINY, assert_same, open_decoder
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.errors import WeightsError

GATE_UP = "model.layers.0.mlp.gate_up_proj"
PHI = dataclasses.replace(TINY, family="phi3", hidden_size=256, head_dim=64)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_matrices_that_stand_for_several(tmp_path: Path, kind: Kind):
    assert_same(*write_both(tmp_path, PHI, kind), PHI)


def test_a_stack_whose_matrices_share_a_scale_is_refused(tmp_path: Path):
    model = dataclasses.replace(TINY, family="phi3")  # k and v have 64 rows
    quantised, _ = write_both(tmp_path, model, fp8_blocks(128, 128))
    with pytest.raises(WeightsError, match="qkv_proj.*128 rows have one element.*128, 64, 64 rows"):
        read_model_folder(quantised)


@pytest.mark.parametrize("kind", KINDS[::4], ids=lambda kind: kind.name)
def test_a_stack_of_other_rows_is_refused(tmp_path: Path, kind: Kind):
    quantised, _ = write_both(tmp_path, PHI, kind)
    update_json(quantised / "config.json", num_key_value_heads=1)
    with pytest.raises(WeightsError, match="qkv_proj.*expected 384 rows, 256 .* 64 .* 64"):
        read_model_folder(quantised)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from((FP8, INT4, GPTQ, AWQ)),
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.sampled_from((0, 1, 2, 8, 96, 256, 768)), max_size=3),
    data=st.data(),
)
def test_any_part_may_be_anything(tmp_path_factory, kind: Kind, dtype: str, shape, data):
    """Whatever a part is, the folder is read as it means or refused with a WeightsError."""
    model = dataclasses.replace(PHI, num_layers=1)
    stored = quantized_tensors(model, kind)[0]
    parts = sorted(name for name in stored if name.startswith(GATE_UP))
    stored[data.draw(st.sampled_from(parts))] = (dtype, np.zeros(shape, DTYPES[dtype]))
    folder = write_quantized(tmp_path_factory.mktemp("parts"), model, kind, stored)
    try:
        open_decoder(folder).close()
    except WeightsError as error:
        assert GATE_UP in str(error)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_a_matrix_of_other_columns_is_called_as_in_its_file(tmp_path: Path, dtype: str):
    model = dataclasses.replace(PHI, num_layers=1)
    stored = quantized_tensors(model, FP8)[0]
    stored[f"{GATE_UP}.weight"] = (dtype, np.zeros((768, 1), DTYPES[dtype]))
    if dtype == "BF16":
        del stored[f"{GATE_UP}.weight_scale"]
    folder = write_quantized(tmp_path, model, FP8, stored)
    expected = r"gate_up_proj\.weight \(read as model\.layers\.0\.mlp\.gate_proj\.weight\): shape"
    with pytest.raises(WeightsError, match=expected):
        open_decoder(folder)
