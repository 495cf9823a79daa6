"""Tidal decoding on the CPU against reference_llama.py: tokens, logits and chosen positions.

float32 weights and cache, so that the only difference is rounding of about 1e-6; the reference is
float64. A set of positions could only differ where two scores agree to that, which the fixed seeds
avoid; exact ties are tested apart, with keys that are all equal.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

import tidaldecode
from reference_llama import Cache, ReferenceLlama, TidalSettings, plan_letters
from tiny_models import TinyModel, random_prompt, random_weights, read_checkpoint, write_checkpoint

MODEL = TinyModel(num_layers=6, num_q_heads=8, num_kv_heads=4, seed=21)
PROMPT = random_prompt(MODEL, 70)
NEW_TOKENS = 24
TOLERANCE = 1e-4  # of the largest logit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tidal"), MODEL)


@pytest.fixture(scope="module")
def reference(folder: Path) -> ReferenceLlama:
    return ReferenceLlama(*read_checkpoint(folder))


def open_decoder(folder: Path, settings: TidalSettings, **options) -> tidaldecode.Decoder:
    defaults = {"device": "cpu", "dtype": "float32", "attention": "tidal", "max_seq_len": 256}
    if not (settings.select_layers or settings.scored_layers):
        defaults["attention"] = "full"
        return tidaldecode.Decoder(folder, **(defaults | options))
    return tidaldecode.Decoder(folder, **(defaults | settings.options() | options))


def greedy(decoder: tidaldecode.Decoder, prompts: list[list[int]], new_tokens: int = NEW_TOKENS):
    results = decoder.generate(prompts, max_new_tokens=new_tokens, temperature=0, ignore_eos=True)
    return [list(result.token_ids) for result in results]


def assert_same_decoding(
    folder: Path, reference: ReferenceLlama, settings: TidalSettings, **options
) -> None:
    expected = reference.generate(PROMPT, NEW_TOKENS, settings)
    decoder = open_decoder(folder, settings, **options)
    assert decoder.plan == plan_letters(reference.num_layers, settings)
    assert greedy(decoder, [PROMPT])[0] == expected.token_ids
    assert_same_selection(decoder.selection(), expected.selection)
    assert_same_logits(decoder, PROMPT, expected.token_ids, expected.logits)


def assert_same_selection(actual: dict, expected: dict[int, np.ndarray]) -> None:
    assert sorted(actual) == sorted(expected)
    for layer, sets in expected.items():
        assert np.array_equal(actual[layer], sets), f"layer {layer}"


def assert_same_logits(decoder, prompt: list[int], token_ids: list[int], logits: list) -> None:
    steps = decoder.step_logits(prompt + token_ids[:-1], prefill=len(prompt))
    expected = np.stack(logits)
    error = np.abs(steps - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"relative difference {error:.2e}"


HEADS = [
    ("kv_head", "sum"), ("kv_head", "max"), ("head", "sum"), ("layer", "sum"), ("layer", "max"),
]  # fmt: skip
ENDS = [(1, 1), (0, 1), (4, 3), (0, 8), (7, 9)]  # sink_tokens, recent_tokens; 7 + 9 is the budget
PLANS = [((2,), 2), ((1, 3), 1), ((2, 4, 5), 2), ((4,), 2), ((3, 4), 3)]  # select, full_layers


@pytest.mark.parametrize(("select_layers", "full_layers"), PLANS)
@pytest.mark.parametrize(("sink_tokens", "recent_tokens"), ENDS)
@pytest.mark.parametrize(("granularity", "pooling"), HEADS)
def test_tokens_logits_and_sets(
    folder, reference, granularity, pooling, sink_tokens, recent_tokens, select_layers, full_layers
):
    settings = TidalSettings(
        select_layers, full_layers, 16, granularity, pooling, sink_tokens, recent_tokens
    )
    assert_same_decoding(folder, reference, settings)


def assert_same_decoding_but_for_ties(
    folder: Path, reference: ReferenceLlama, settings: TidalSettings
) -> None:
    """For choices by rounded keys, where float32 may exchange two positions and float64 not.

    A step that differs must be what the reference makes with some noise of float32's size; later
    steps read what followed from it, and are compared with the reference that took the same way.
    """
    expected = reference.generate(PROMPT, NEW_TOKENS, settings)
    decoder = open_decoder(folder, settings)
    assert decoder.plan == plan_letters(reference.num_layers, settings)
    steps = decoder.step_logits(PROMPT + expected.token_ids[:-1], prefill=len(PROMPT))
    assert np.abs(steps[0] - expected.logits[0]).max() <= TOLERANCE * np.abs(steps[0]).max()
    _, caches = reference.prefill(PROMPT)
    num_exchanged = 0
    for token_id, actual in zip(expected.token_ids[:-1], steps[1:], strict=True):
        caches, attempt = step_like(reference, actual, token_id, caches, settings)
        num_exchanged += attempt > 0
    assert num_exchanged <= 0.2 * NEW_TOKENS


def step_like(
    reference: ReferenceLlama,
    actual: np.ndarray,
    token_id: int,
    caches: list[Cache],
    settings: TidalSettings,
) -> tuple[list[Cache], int]:
    """A step of the reference with these logits: the caches behind it, and how often it took noise.

    The first attempt has none.
    """
    errors = []
    for attempt in range(100):
        tried = [dataclasses.replace(cache) for cache in caches]
        reference.noise = np.random.default_rng(attempt) if attempt > 0 else None
        logits, _ = reference.step(token_id, tried, settings)
        reference.noise = None
        errors.append(np.abs(actual - logits).max() / np.abs(logits).max())
        if errors[-1] <= TOLERANCE:
            return tried, attempt
    raise AssertionError(f"relative difference {min(errors):.2e}")


SCORED_PLANS = [
    ((), (2,), 2), ((), (1, 3), 1), ((), (2, 3, 4, 5), 2), ((2,), (4,), 2), ((3,), (1, 2, 5), 1),
]  # fmt: skip


@pytest.mark.parametrize(("select_layers", "scored_layers", "full_layers"), SCORED_PLANS)
@pytest.mark.parametrize(("granularity", "pooling"), HEADS)
def test_scored_layers(
    folder, reference, granularity, pooling, select_layers, scored_layers, full_layers
):
    settings = TidalSettings(
        select_layers, full_layers, 16, granularity, pooling, 1, 4, scored_layers=scored_layers
    )
    assert_same_decoding(folder, reference, settings)


@pytest.mark.parametrize(("select_layers", "scored_layers", "full_layers"), SCORED_PLANS)
@pytest.mark.parametrize(("granularity", "pooling"), HEADS)
def test_shadow_keys(
    folder, reference, granularity, pooling, select_layers, scored_layers, full_layers
):
    settings = TidalSettings(
        select_layers, full_layers, 16, granularity, pooling, 1, 4, scored_layers=scored_layers,
        shadow="int4",
    )  # fmt: skip
    assert_same_decoding_but_for_ties(folder, reference, settings)


@pytest.mark.parametrize("granularity", ["kv_head", "head", "layer"])
def test_shadow_keys_with_adaptive_budgets(folder, reference, granularity):
    settings = TidalSettings(
        (), 1, 30, granularity, sink_tokens=1, recent_tokens=2, top_p_mass=0.65,
        min_token_budget=6, scored_layers=(1, 3, 4), shadow="int4",
    )  # fmt: skip
    assert_same_decoding_but_for_ties(folder, reference, settings)


@pytest.mark.parametrize("granularity", ["kv_head", "head", "layer"])
def test_scored_layers_with_adaptive_budgets(folder, reference, granularity):
    settings = TidalSettings(
        (), 1, 40, granularity, sink_tokens=1, recent_tokens=2, top_p_mass=0.7,
        min_token_budget=6, scored_layers=(1, 3, 4),
    )  # fmt: skip
    assert_same_decoding(folder, reference, settings)


@pytest.mark.parametrize("token_budget", [1, 2, 5, 33, 64])
def test_budgets(folder, reference, token_budget):
    sinks = 0 if token_budget == 1 else 1
    settings = TidalSettings((1, 3), 1, token_budget, sink_tokens=sinks)
    assert_same_decoding(folder, reference, settings)


@pytest.mark.parametrize("granularity", ["kv_head", "head", "layer"])
@pytest.mark.parametrize(
    ("top_p_mass", "least", "most"), [(0.5, 4, 40), (0.9, 12, 30), (0.98, 6, 64)]
)
def test_adaptive_budgets(folder, reference, granularity, top_p_mass, least, most):
    settings = TidalSettings(
        (1, 3), 1, most, granularity, sink_tokens=1, recent_tokens=2, top_p_mass=top_p_mass,
        min_token_budget=least,
    )  # fmt: skip
    assert_same_decoding(folder, reference, settings)
    decoder = open_decoder(folder, settings)
    greedy(decoder, [PROMPT])
    for sets in decoder.selection().values():
        sizes = (sets >= 0).sum(axis=1)
        assert sizes.min() >= least and sizes.max() <= most
        for positions, size in zip(sets, sizes, strict=True):
            assert (positions[:size] >= 0).all()


@pytest.mark.parametrize("page_size", [1, 5, 16, 64, 256])
def test_page_size_changes_nothing(folder, reference, page_size):
    settings = TidalSettings((2, 4), 2, 12, sink_tokens=2, recent_tokens=3)
    assert_same_decoding(folder, reference, settings, page_size=page_size)


@pytest.mark.parametrize("group_size", [1, 2, 4, 8])
def test_group_sizes(tmp_path, group_size):
    model = dataclasses.replace(MODEL, num_kv_heads=8 // group_size, seed=22)
    folder = write_checkpoint(tmp_path, model)
    reference = ReferenceLlama(*read_checkpoint(folder))
    for granularity in ("kv_head", "head", "layer"):
        assert_same_decoding(folder, reference, TidalSettings((1, 4), 1, 10, granularity))


@pytest.mark.parametrize(
    "model",
    [
        TinyModel(family="qwen2", seed=23),
        TinyModel(family="qwen3", seed=24, tie=True),
        TinyModel(family="mistral", rope="linear", seed=25),
        TinyModel(rope="llama3", attention_bias=True, mlp_bias=True, seed=26),
        TinyModel(head_dim=64, seed=27),
        TinyModel(family="qwen3", head_dim=128, num_q_heads=2, num_kv_heads=1, seed=28),
    ],
    ids=lambda m: f"{m.family} {m.rope} {m.head_dim}",
)
def test_other_models(tmp_path, model):
    folder = write_checkpoint(tmp_path, model)
    reference = ReferenceLlama(*read_checkpoint(folder))
    assert_same_decoding(folder, reference, TidalSettings((1, 2), 1, 8))


def test_crossing_the_budget(folder, reference):
    """Steps up to the budget are dense and choose nothing; the next one chooses."""
    prompt, budget = PROMPT[:20], 30
    settings = TidalSettings((2,), 2, budget)
    expected = reference.generate(prompt, NEW_TOKENS, settings)
    decoder = open_decoder(folder, settings)
    # Step i has 20 + i tokens in the cache: 10 steps are dense, 11 tokens come from dense rows.
    greedy(decoder, [prompt], 11)
    assert decoder.selection() == {}
    greedy(decoder, [prompt], 12)
    assert decoder.selection()[2].shape == (MODEL.num_kv_heads, budget)
    assert greedy(decoder, [prompt])[0] == expected.token_ids
    assert_same_selection(decoder.selection(), expected.selection)


@pytest.mark.parametrize("sparse_min_context", [71, 80, 300])
def test_sparse_min_context(folder, reference, sparse_min_context):
    settings = TidalSettings((2, 4), 2, 8, sparse_min_context=sparse_min_context)
    assert_same_decoding(folder, reference, settings)
    if sparse_min_context == 300:
        dense = greedy(open_decoder(folder, TidalSettings()), [PROMPT])
        assert greedy(open_decoder(folder, settings), [PROMPT]) == dense


@pytest.mark.parametrize("granularity", ["kv_head", "head", "layer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_budget_that_covers_the_context_is_dense_bitwise(folder, granularity, dtype):
    settings = TidalSettings((1, 3), 1, token_budget=128, granularity=granularity)
    dense = open_decoder(folder, TidalSettings(), dtype=dtype, kv_dtype=dtype)
    tidal = open_decoder(folder, settings, dtype=dtype, kv_dtype=dtype)
    tokens = greedy(dense, [PROMPT])[0]
    assert greedy(tidal, [PROMPT])[0] == tokens
    assert np.array_equal(
        tidal.step_logits(PROMPT + tokens, prefill=len(PROMPT)),
        dense.step_logits(PROMPT + tokens, prefill=len(PROMPT)),
    )


def test_a_batch_of_different_lengths(folder, reference):
    """Rows below and above the budget decode together, each as it would alone."""
    settings = TidalSettings((2, 4), 2, 32)
    prompts = [random_prompt(MODEL, n, seed=n) for n in (10, 25, 31, 33, 120, 64)]
    decoder = open_decoder(folder, settings, max_batch_size=len(prompts))
    tokens = greedy(decoder, prompts)
    for row, prompt in enumerate(prompts):
        expected = reference.generate(prompt, NEW_TOKENS, settings)
        assert tokens[row] == expected.token_ids
        assert_same_selection(decoder.selection(row), expected.selection)


def write_equal_keys(folder: Path, bias: bool) -> Path:
    """Every key of the model is the same vector: 0, or the bias, which rope does not turn here."""
    model = dataclasses.replace(
        MODEL, attention_bias=bias, rope="linear", rope_extra={"factor": 1e30}
    )
    weights = random_weights(model)
    for name in weights:
        if name.endswith("k_proj.weight"):
            weights[name] = np.zeros_like(weights[name])
    return write_checkpoint(folder, model, weights)


@pytest.mark.parametrize("bias", [False, True], ids=["scores all 0", "scores all equal"])
@pytest.mark.parametrize(("granularity", "pooling"), HEADS)
def test_equal_scores_choose_the_lowest_positions(tmp_path, granularity, pooling, bias):
    folder = write_equal_keys(tmp_path, bias)
    settings = TidalSettings((2, 4), 2, 20, granularity, pooling, 1, 3)
    decoder = open_decoder(folder, settings)
    greedy(decoder, [PROMPT])
    n = len(PROMPT) + NEW_TOKENS - 1  # the last token was chosen, but not yet put into the cache
    expected = np.concatenate((np.arange(17), np.arange(n - 3, n)))
    num_sets = {"kv_head": 4, "head": 8, "layer": 1}[granularity]
    for layer in settings.select_layers:
        assert np.array_equal(decoder.selection()[layer], np.tile(expected, (num_sets, 1)))
    assert_same_decoding(folder, ReferenceLlama(*read_checkpoint(folder)), settings)


SMALLER_FORMATS = [
    ("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "int8"), ("bfloat16", "int8"),
    ("float32", "fp8"), ("bfloat16", "fp8"),
]  # fmt: skip


def written_in(folder: Path, dtype: str, kv_dtype: str, **changes) -> ReferenceLlama:
    model = dataclasses.replace(MODEL, dtype=dtype, **changes)
    return ReferenceLlama(*read_checkpoint(write_checkpoint(folder, model)), kv_dtype=kv_dtype)


@pytest.mark.parametrize(("dtype", "kv_dtype"), SMALLER_FORMATS)
def test_smaller_weights_and_cache(tmp_path, dtype, kv_dtype):
    """One layer, whose keys and values are rounded alike: no other layer enlarges a difference.

    One number between two codes may fall to the other side.
    """
    reference = written_in(tmp_path, dtype, kv_dtype, num_layers=1)
    settings = TidalSettings()
    expected = reference.generate(PROMPT, NEW_TOKENS, settings)
    decoder = open_decoder(tmp_path, settings, dtype=dtype, kv_dtype=kv_dtype)
    assert greedy(decoder, [PROMPT])[0] == expected.token_ids
    assert_same_logits(decoder, PROMPT, expected.token_ids, expected.logits)


@pytest.mark.parametrize(("dtype", "kv_dtype"), SMALLER_FORMATS)
def test_layers_of_smaller_weights_and_cache(tmp_path, dtype, kv_dtype):
    """Six layers: no further off than float32's noise in front of the rounding moves them."""
    reference = written_in(tmp_path, dtype, kv_dtype)
    # With the coarser types a set changes too often to be asked for.
    is_coarse = kv_dtype in ("int8", "fp8")
    settings = TidalSettings() if is_coarse else TidalSettings((2, 4), 2, 16)
    expected = reference.generate(PROMPT, NEW_TOKENS, settings)
    decoder = open_decoder(tmp_path, settings, dtype=dtype, kv_dtype=kv_dtype)
    token_ids = PROMPT + expected.token_ids[:-1]
    assert greedy(decoder, [PROMPT])[0] == expected.token_ids
    steps = decoder.step_logits(token_ids, prefill=len(PROMPT))

    reference.noise = np.random.default_rng(1)
    moved, _ = reference.prefill(token_ids)
    reference.noise = None
    exact, _ = reference.prefill(token_ids)
    largest = np.abs(expected.logits).max()
    by_noise = np.abs(moved - exact)[-NEW_TOKENS:].max(-1) / largest
    errors = np.abs(steps - np.stack(expected.logits)).max(-1) / largest
    assert np.median(errors) <= min(np.median(by_noise), 2e-3)
    assert errors.max() <= 5e-2


def test_the_reference_is_not_blind(reference):
    """Each setting changes the logits, so an engine that ignored it would fail above."""
    base = TidalSettings((2, 4), 2, 16, "kv_head", "sum", 1, 1)
    changes = [
        {"select_layers": ()}, {"select_layers": (2,)}, {"token_budget": 15},
        {"granularity": "head"}, {"granularity": "layer"}, {"pooling": "max"},
        {"sink_tokens": 4}, {"recent_tokens": 6}, {"sparse_min_context": 80},
    ]  # fmt: skip
    tokens = reference.generate(PROMPT, NEW_TOKENS, base).token_ids

    def forced_logits(settings: TidalSettings) -> np.ndarray:
        _, caches = reference.prefill(PROMPT)
        return np.stack([reference.step(token, caches, settings)[0] for token in tokens])

    outcomes = [forced_logits(base)]
    outcomes += [forced_logits(dataclasses.replace(base, **change)) for change in changes]
    for a, b in itertools.combinations(outcomes, 2):
        assert np.abs(a - b).max() / np.abs(a).max() > 100 * TOLERANCE
