"""quantization_config in config.json: what each method says, and what is refused by name."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantized_models import KINDS, PER_TENSOR, PER_TOKEN, gptq, packed_group
from reference_transformers import TRANSFORMERS
from tidaldecode.checkpoint.quant_scheme import Quantization
from tidaldecode.checkpoint.quantization import read_quantization
from tidaldecode.errors import ConfigError

FP8, AWQ = KINDS[0].config, next(kind for kind in KINDS if kind.codes == "awq").config
GPTQ, INT4 = gptq(128, "gptq").config, packed_group(128, True).config
BLOCKS = next(kind for kind in KINDS if kind.name.startswith("fp8 in blocks")).config
PROJECTION = "model.layers.3.mlp.up_proj"


def read(config: Any) -> Quantization | None:
    return read_quantization({"quantization_config": config}, "config.json")


def scheme(config: Any, name: str = PROJECTION):
    return read(config).scheme_of([name])


def with_weights(config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The config with other settings of its first group's weights."""
    config = copy.deepcopy(config)
    config["config_groups"]["group_0"]["weights"] |= fields
    return config


def with_group(config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The config with other settings of its first group."""
    config = copy.deepcopy(config)
    config["config_groups"]["group_0"] |= fields
    return config


# Meaning


def test_no_config_is_none():
    assert read(None) is None and read_quantization({}, "config.json") is None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_projection_has_a_scheme_and_the_output_matrix_none(kind):
    found = scheme(kind.config)
    assert found.has_zeros == kind.zeros
    assert found.format.endswith(kind.codes)
    if not found.may_have_one_scale:
        assert found.block == tuple(size or None for size in kind.block)
    if kind.codes != "gptq" and kind.config.get("quant_method") != "awq":
        assert scheme(kind.config, "lm_head") is None


@pytest.mark.parametrize(
    ("ignore", "name", "is_ignored"),
    [
        ([PROJECTION], PROJECTION, True),
        ([PROJECTION], PROJECTION + "s", False),
        (["up_proj"], PROJECTION, False),
        (["re:.*up_proj$"], PROJECTION, True),
        (["re:up_proj"], PROJECTION, False),  # from the start
        (["re:model\\.layers\\.[0-9]+\\.mlp\\..*"], PROJECTION, True),
        (["re:.*layers\\.1\\..*"], PROJECTION, False),
        (["Linear"], PROJECTION, True),
        (["Embedding"], PROJECTION, False),
        ([], PROJECTION, False),
        (None, PROJECTION, False),
    ],
    ids=str,
)
def test_ignored_as_compressed_tensors_does(ignore, name: str, is_ignored: bool):
    assert (scheme(FP8 | {"ignore": ignore}, name) is None) == is_ignored


@pytest.mark.parametrize(
    ("key", "is_ignored"),
    [
        ("up_proj", True),
        ("proj", True),
        ("model.layers.3", True),
        ("model.layers.3.mlp", True),
        ("model.layers.*", True),
        ("model.layers.1", False),
        ("layers.3", False),
        ("model.layers.3.mlp.up", False),
        ("lm_head", False),
        ("model.layers.3.mlp.up_proj", True),
    ],
)
@pytest.mark.parametrize("config", [BLOCKS, AWQ], ids=["fp8", "awq"])
def test_not_converted_as_transformers_does(config, key: str, is_ignored: bool):
    found = scheme(config | {"modules_to_not_convert": [key]})
    assert (found is None) == is_ignored
    pytest.importorskip("transformers", minversion=TRANSFORMERS)
    utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    assert is_ignored == (not utils.should_convert_module(PROJECTION, [key]))


def test_a_name_counts_before_a_pattern_and_a_pattern_before_a_class():
    group = FP8["config_groups"]["group_0"]
    groups = {
        "class": group | {"targets": ["Linear"]},
        "pattern": group | {"targets": ["re:.*mlp.*"], "weights": None},
        "name": group | {"targets": [PROJECTION], "weights": PER_TENSOR},
    }
    found = read(FP8 | {"config_groups": groups})
    assert found.scheme_of(["model.layers.0.self_attn.q_proj"]).block == (1, None)
    assert found.scheme_of(["model.layers.0.mlp.up_proj"]) is None
    assert found.scheme_of([PROJECTION]).block == (None, None)


def test_defaults_are_those_of_the_libraries():
    assert scheme({"quant_method": "awq"}).block == (1, 128)
    assert scheme({"quant_method": "gptq", "bits": 4}).zero_offset == 1
    assert scheme({"quant_method": "gptq", "bits": 4, "format": "gptq_v2"}).zero_offset == 0
    found = scheme({"quant_method": "fp8"})
    assert found.block == (128, 128) and found.may_have_one_scale
    weights = {"num_bits": 8, "type": "float", "symmetric": True}
    assert scheme(with_group(FP8, weights=weights)).block == (None, None)
    assert scheme(with_group(INT4, weights={"num_bits": 4, "group_size": 64})).block == (1, 64)
    assert scheme(with_group(INT4, weights={"num_bits": 4, "group_size": -1})).block == (1, None)
    block = {"strategy": "block", "block_structure": "64x32", "num_bits": 8, "type": "FLOAT"}
    assert scheme(with_group(FP8, weights=block)).block == (64, 32)


def test_older_writers_call_what_is_compressed_frozen():
    assert scheme(FP8 | {"quantization_status": "frozen"}) == scheme(FP8)


def test_groups_without_weights_quantise_none():
    assert scheme(with_group(FP8, weights=None)) is None
    assert scheme(with_group(FP8, format="dense")) is None
    assert scheme(FP8 | {"config_groups": {}}) is None


# Refusals

REFUSED = [
    ("int8", r"got 'int8', expected an object"),
    ([], r"got \[\], expected an object"),
    ({}, "quant_method: got None, supported are compressed-tensors .*fp8, awq .*gptq"),
    *[
        ({"quant_method": method}, f"quant_method: got '{method}', supported are")
        for method in ("bitsandbytes", "gguf", "modelopt", "quark", "aqlm", "hqq")
    ],
    ({"quant_method": ["fp8"]}, "quant_method: got"),
    # fp8
    (BLOCKS | {"activation_scheme": "odd"}, "activation_scheme: got 'odd'"),
    (BLOCKS | {"fmt": "e5m2"}, "fmt: got 'e5m2', supported is 'e4m3'"),
    (BLOCKS | {"weight_block_size": [128]}, "weight_block_size: .*expected .rows, columns."),
    (BLOCKS | {"weight_block_size": [128, 0]}, "weight_block_size"),
    (BLOCKS | {"weight_block_size": [128, True]}, "weight_block_size"),
    (BLOCKS | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert: got 'lm_head'"),
    (BLOCKS | {"modules_to_not_convert": ["("]}, "modules_to_not_convert: got the pattern"),
    # awq
    (AWQ | {"bits": 8}, "bits: got 8, supported is 4"),
    (AWQ | {"bits": 4.0}, "bits: got 4.0, supported is 4"),
    (AWQ | {"version": "gemv"}, "version: got 'gemv', supported is 'gemm'"),
    (AWQ | {"zero_point": False}, "zero_point: got False"),
    (AWQ | {"group_size": 0}, "group_size: got 0"),
    (AWQ | {"group_size": -2}, "group_size: got -2"),
    (AWQ | {"backend": "llm-awq"}, "backend: got 'llm-awq'"),
    # gptq
    *[(GPTQ | {"bits": bits}, f"bits: got {bits}, supported is 4") for bits in (2, 3, 8)],
    ({"quant_method": "gptq"}, "bits is missing"),
    (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format: got 'marlin'"),
    (
        GPTQ | {"dynamic": {"-:lm_head": {}, "+:.*mlp.*": {"bits": 8}}},
        "dynamic: '[+]:.*mlp.*': got {'bits': 8}, supported is one way",
    ),
    (GPTQ | {"dynamic": ["-:lm_head"]}, "dynamic: got .*not supported"),
    (GPTQ | {"pack_dtype": "int16"}, "pack_dtype: got 'int16'"),
    (GPTQ | {"desc_act": "no"}, "desc_act: got 'no'"),
    # compressed-tensors
    (FP8 | {"quantization_status": "initialized"}, "quantization_status: got 'initialized'"),
    *[
        (FP8 | {"format": form}, f"format: got '{form}', supported are 'float-quantized'")
        for form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "marlin-24", "mixed-precision")
    ],
    (FP8 | {"format": None}, "format: got None"),
    (FP8 | {"format": "pack-quantized"}, "'float' of 8 bits in the format 'pack-quantized'"),
    (with_weights(INT4, num_bits=6), "'int' of 6 bits .*supported is int of 4 bits or int of 8"),
    (with_weights(INT4, num_bits=3), "'int' of 3 bits"),
    (with_weights(INT4, actorder="group"), "actorder: got 'group', supported is False or 'weight'"),
    (with_weights(INT4, actorder=True), "actorder: got True"),
    (with_weights(INT4, group_size=None), "group_size is missing"),
    (with_weights(INT4, strategy="tensor_group"), "strategy: got 'tensor_group'"),
    (with_weights(INT4, dynamic=True), "dynamic: got True"),
    (with_weights(INT4, zig=1), "weights: 'zig': not known here"),
    (with_weights(FP8, symmetric=False), "symmetric: got false"),
    (with_weights(FP8, strategy="block"), "block_structure: got None"),
    (with_weights(FP8, num_bits=8, type="uint"), "'uint' of 8 bits"),
    (with_group(FP8, weights=3), "weights: got 3, expected an object"),
    (with_group(FP8, targets=[]), "targets: got none"),
    (with_group(FP8, targets=["re:("]), "targets: got the pattern"),
    (with_group(FP8, output_activations=PER_TOKEN), "output_activations: got"),
    (with_group(FP8, zig=1), "'zig': not known here"),
    (FP8 | {"config_groups": {"FP8_DYNAMIC": ["Linear"]}}, "FP8_DYNAMIC.*expected an object"),
    (FP8 | {"config_groups": []}, "config_groups: got"),
    (FP8 | {"ignore": "lm_head"}, "ignore: got 'lm_head'"),
    (FP8 | {"ignore": ["re:["]}, "ignore: got the pattern"),
    (FP8 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config: .*24-bitmask"),
    (FP8 | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_supported_is_refused_by_name(config: Any, message: str):
    with pytest.raises(ConfigError, match=message) as error:
        read(config)
    assert "config.json: quantization_config" in str(error.value)


SLOW = ("(a|a)*b", "(.*)*x", "(.+)+x", ".*.*.*.*.*x", "(?:a?){40}x", "([a-z]*.)*x")


@pytest.mark.parametrize("pattern", SLOW)
def test_patterns_that_could_take_long_are_refused(pattern: str):
    start = time.monotonic()
    for config in (FP8 | {"ignore": [f"re:{pattern}"]}, BLOCKS | {"ignored_layers": [pattern]}):
        with pytest.raises(ConfigError, match="got the pattern .*expected at most"):
            read(config).scheme_of(["a" * 60])
    assert time.monotonic() - start < 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 200) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@given(st.sampled_from([FP8, INT4, AWQ, GPTQ, BLOCKS]), st.data())
def test_any_field_may_be_anything(config: dict[str, Any], data):
    """Whatever a field holds, it is taken or refused with a ConfigError."""
    places = [config := copy.deepcopy(config)]
    if "config_groups" in config:
        group = config["config_groups"]["group_0"]
        places += [group, group["weights"]]
    place = data.draw(st.sampled_from(places))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    try:
        found = read(config)
    except ConfigError:
        return
    assert found is None or found.text
    if found is not None:
        found.scheme_of([PROJECTION])
