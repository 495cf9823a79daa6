"""Page-wise selection in every layer, in the manner of Quest (arXiv 2406.10774): a yardstick.

Used by runner.py and costs.py. Not in the engine: here is the numpy reference model with
Quest's rule. A page's score for a query head is the most that any key within the bounds of the
page's keys could give; each head attends to the best pages. As published: the first two layers are
dense, and pages are of 16 tokens. The newest page is always in, so that the newest token is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.evaluation.reference import ReferenceModel, softmax
from tidaldecode.plan_bytes import row_bytes

_DENSE_LAYERS = 2


class QuestReplay:
    """A prompt in the reference model's cache: Replay's methods for one prompt."""

    def __init__(self, model: ReferenceModel, prompt_ids: Sequence[int], room: int) -> None:
        self._model = model
        self._cache, self._first = model.read(prompt_ids, room)
        self._num_read = len(prompt_ids)
        self._set_sizes: list[float] = []  # of the last call

    @property
    def mean_set_size(self) -> float:
        """As Replay.mean_set_size."""
        return float(np.mean(self._set_sizes)) if self._set_sizes else 0.0

    def step_logits(
        self, continuations: Sequence[Sequence[int]], **options: Any
    ) -> list[np.ndarray]:
        """As Replay.step_logits, of one continuation; options: token_budget, page_size."""
        (tokens,) = continuations
        self._cache.num_tokens, self._set_sizes = self._num_read, []
        return [np.stack([self._first, *(self._step(token, options) for token in tokens)])]

    def greedy(
        self, max_new_tokens: int, *, eos_token_ids: Sequence[int], **options: Any
    ) -> list[list[int]]:
        """As Replay.greedy, of one prompt."""
        self._cache.num_tokens, self._set_sizes = self._num_read, []
        output, logits = [], self._first
        while True:
            output.append(int(np.argmax(logits)))
            if output[-1] in eos_token_ids or len(output) >= max_new_tokens:
                return [output]
            logits = self._step(output[-1], options)

    def _step(self, token: int, options: dict[str, Any]) -> np.ndarray:
        def attend(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
            chosen = None
            if layer >= _DENSE_LAYERS and len(k) > options["token_budget"]:
                chosen = chosen_tokens(q, k, options["token_budget"], options["page_size"])
                self._set_sizes.append(chosen.sum(axis=1).mean())
            return _attend(q, k, v, chosen)

        return self._model.step(token, self._cache, attend)


def page_bytes_per_step(
    model: ModelConfig, options: dict[str, int], seq_len: int, kv_dtype: str
) -> int:
    """Bytes of keys and values that a step reads for one sequence, and of the bounds of its pages.

    Bounds are two vectors a page and KV head, as much as K and V of one position. Every query head
    reads pages of its own, as plan_bytes.py counts them.

    Args:
        model: its shape.
        options: token_budget, page_size.
        seq_len: tokens in the cache.
        kv_dtype: of the cache.
    """
    token_budget, page_size = options["token_budget"], options["page_size"]
    sparse_layers = max(0, model.num_layers - _DENSE_LAYERS)
    if seq_len <= token_budget:
        sparse_layers = 0
    pages = max(1, token_budget // page_size) * (model.num_q_heads // model.num_kv_heads)
    sparse_rows = -(-seq_len // page_size) + min(seq_len, pages * page_size)
    rows = (model.num_layers - sparse_layers) * seq_len + sparse_layers * sparse_rows
    return rows * row_bytes(model, kv_dtype)


def chosen_tokens(q: np.ndarray, k: np.ndarray, token_budget: int, page_size: int) -> np.ndarray:
    """Which tokens each query head attends to.

    Args:
        q: [num_q_heads, head_dim].
        k: [n, num_kv_heads, head_dim].
        token_budget: of tokens; token_budget // page_size pages, at least one.
        page_size: tokens of a page.

    Returns: [num_q_heads, n] bool.
    """
    n, num_kv_heads, head_dim = k.shape
    num_pages = -(-n // page_size)
    # The last page is filled up with its last key, which changes no bound.
    padded = np.concatenate([k, np.repeat(k[-1:], num_pages * page_size - n, axis=0)])
    pages = padded.reshape(num_pages, page_size, num_kv_heads, head_dim)
    grouped = q.reshape(num_kv_heads, -1, head_dim)
    # The bound of q.k is reached in a corner: the larger key where q is positive, else the smaller.
    bounds = np.einsum("gqd,pgd->gqp", np.maximum(grouped, 0), pages.max(axis=1))
    bounds += np.einsum("gqd,pgd->gqp", np.minimum(grouped, 0), pages.min(axis=1))
    bounds = bounds.reshape(len(q), num_pages)
    bounds[:, -1] = np.inf
    count = min(num_pages, max(1, token_budget // page_size))
    best = np.argsort(-bounds, axis=1, kind="stable")[:, :count]
    is_chosen = np.zeros((len(q), num_pages), bool)
    np.put_along_axis(is_chosen, best, True, axis=1)
    return np.repeat(is_chosen, page_size, axis=1)[:, :n]


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, chosen: np.ndarray | None) -> np.ndarray:
    n, num_kv_heads, head_dim = k.shape
    grouped = q.reshape(num_kv_heads, -1, head_dim)
    scores = np.einsum("gqd,ngd->gqn", grouped, k) * np.float32(head_dim**-0.5)
    if chosen is not None:
        scores[~chosen.reshape(scores.shape)] = -np.inf
    return np.einsum("gqn,ngd->gqd", softmax(scores), v).reshape(q.shape)
