"""What keys in 4 bits find of what the keys themselves would choose, on models that were trained.

Every layer behind the first two, the last positions of a text; with and without channels in which
keys are ten times as large and queries a tenth, as large models have them. The factors come from
random tokens, as in the engine (cpp/src/decode/shadow_balance.cc).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reference_shadow import NUM_TOKENS, balance_of, random_tokens, shadow_scores
from tidaldecode import demo_model_dir
from tidaldecode.calibration.data import builtin_text
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.evaluation.reference import ReferenceModel
from tidaldecode.text.tokenizer import Tokenizer

LENGTH = 1536
STEPS = range(0, 96, 24)  # positions before the last
Pass = tuple[np.ndarray, list[np.ndarray]]  # keys [layers, n, heads, d]; queries of every layer


def read(model: ReferenceModel, token_ids: list[int], monkeypatch: pytest.MonkeyPatch) -> Pass:
    queries: list[np.ndarray] = []
    real = model._qkv

    def watched(*args):
        q, k, v = real(*args)
        queries.append(q)
        return q, k, v

    with monkeypatch.context() as patch:
        patch.setattr(model, "_qkv", watched)
        cache, _ = model.read(token_ids, 1)
    return cache.k[:, : len(token_ids)], queries


@pytest.fixture(scope="module", params=["demo", "reference", "public"])
def passes(request: pytest.FixtureRequest) -> tuple[Pass, Pass]:
    """What a model makes of random tokens and of a text."""
    if request.param == "demo":
        path = demo_model_dir()
    elif request.param == "reference":
        path = request.config.getoption("--reference-model")
    else:
        path = Path(request.config.getoption("--public-models")) / "SmolLM2-135M-Instruct"
    if path is None or not Path(path).is_dir():
        pytest.skip(f"no {path}")
    folder = read_model_folder(Path(path))
    tokenizer = Tokenizer(folder.path, folder.model.vocab_size)
    token_ids = tokenizer.encode(builtin_text()[5000 : 5000 + 8 * LENGTH])[:LENGTH]
    tokenizer.close()
    model = ReferenceModel(folder)
    with pytest.MonkeyPatch.context() as patch:
        drawn = read(model, random_tokens(NUM_TOKENS, folder.model.vocab_size), patch)
        return drawn, read(model, token_ids, patch)


def with_outliers(keys: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same attention with three channels that only keys have much of."""
    factors = np.ones(keys.shape[-1])
    factors[[3, 20, 37]] = 10.0
    return keys * factors, queries / factors


def shares(q: np.ndarray, keys: np.ndarray, balance: np.ndarray, count: int) -> list[float]:
    """For the best `count` positions of a layer: their share among the best twice as many by the
    shadow; and the mass of the best by the shadow, and of the best twice as many, over theirs."""
    scale = q.shape[-1] ** -0.5
    group_size = len(q) // len(balance)
    exact = np.stack([keys[:, head // group_size] @ query for head, query in enumerate(q)])

    def pooled(scores: np.ndarray) -> np.ndarray:
        weights = np.exp(scores * scale)
        return (weights / weights.sum(-1, keepdims=True)).sum(0)

    mass = pooled(exact)
    best = np.argsort(-mass)[:count]
    found = np.argsort(-pooled(shadow_scores(q, keys, balance)))[: 2 * count]
    of_best = mass[best].sum()
    return [
        np.isin(best, found).mean(), mass[found[:count]].sum() / of_best,
        mass[found].sum() / of_best,
    ]  # fmt: skip


@pytest.mark.parametrize("outliers", [False, True], ids=["as trained", "with outliers"])
@pytest.mark.parametrize("count", [64, 256])
def test_the_shadow_finds_what_the_keys_would_choose(
    passes: tuple[Pass, Pass], count: int, outliers: bool
):
    (random_keys, random_queries), (keys, queries) = passes
    found = []
    for layer in range(2, len(queries)):
        drawn = random_keys[layer], random_queries[layer]
        own = keys[layer].astype(np.float64), queries[layer].astype(np.float64)
        if outliers:
            drawn, own = with_outliers(*drawn), with_outliers(*own)
        balance = balance_of(*drawn)
        for back in STEPS:
            n = LENGTH - back
            found.append(shares(own[1][n - 1], own[0][:n], balance, count))
    recall, mass, mass_of_twice = np.mean(found, axis=0)
    assert recall >= 0.995 and mass >= 0.996, (recall, mass)
    # To rank twice as many exactly would read as many bytes as to attend to all of them.
    assert mass_of_twice >= 1.02, mass_of_twice
