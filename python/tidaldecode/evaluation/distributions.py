"""Losses and divergences of next-token distributions, from the engine's logits.

Used by runner.py, perplexity.py and the calibration. All in float64, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tidaldecode.errors import TidalError


def unusable_logits(where: str) -> TidalError:
    """What to raise for logits that hold a NaN or infinity; `where` is what ran."""
    return TidalError(
        f"{where}: the logits after a prompt hold a NaN or infinity; check the weights, or try "
        "--dtype float32"
    )


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """log softmax of each row: [rows, vocab_size] float64 of any real [rows, vocab_size]."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def token_losses(logits: np.ndarray, token_ids: Sequence[int]) -> np.ndarray:
    """What each token costs under the row that predicts it.

    Args:
        logits: [rows, vocab_size], rows >= len(token_ids); row i predicts token i.
        token_ids: the tokens that came.

    Returns: [len(token_ids)] float64, -log p.
    """
    rows = np.arange(len(token_ids))
    return -log_probabilities(logits[: len(rows)])[rows, list(token_ids)]


def divergences(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(reference || other) of each pair of rows: [rows] float64 of two [rows, vocab_size]."""
    expected, got = log_probabilities(reference), log_probabilities(logits)
    return (np.exp(expected) * (expected - got)).sum(axis=-1)


def same_choices(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Whether each pair of rows has the same most likely token: [rows] bool."""
    return reference.argmax(axis=-1) == logits.argmax(axis=-1)


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share before they first differ."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
