"""A model in numpy, slow and plain: what the engine does not show, and what it does not do.

Used by attention.py, which looks at dense attention weights, and by quest.py, another way to choose
positions. All in float32; a prompt of 4096 tokens takes a 30M-parameter model some 20 seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tidaldecode import _core
from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.engine_config import core_weights
from tidaldecode.errors import UnsupportedError

# (layer, q [num_q_heads, head_dim], k, v [n, num_kv_heads, head_dim]) to [num_q_heads, head_dim];
# the newest token is the last of n.
Attend = Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]

_CHUNK = 256  # queries of a prompt whose scores are in memory together


def softmax(scores: np.ndarray) -> np.ndarray:
    """The softmax of each row: any real [..., n]."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@dataclass
class Cache:
    """Keys (rotated) and values of a sequence: [num_layers, room, num_kv_heads, head_dim]."""

    k: np.ndarray
    v: np.ndarray
    num_tokens: int = 0


def missing_in_numpy(folder: ModelFolder) -> str | None:
    """A part of a model that ReferenceModel does not have; None if it has all."""
    model = folder.model
    if model.rope.type != "default":
        return f"rotary positions of type {model.rope.type!r}, only of type 'default'"
    if any(model.windows):
        return "layers with a window"
    if model.attention_sinks:
        return "attention sinks"
    if model.rope.query_scale_beta:
        return "queries that are scaled by their position"
    return None


def check_in_numpy(folder: ModelFolder) -> None:
    """Raises: UnsupportedError for a model that ReferenceModel does not do."""
    missing = missing_in_numpy(folder)
    if missing is not None:
        raise UnsupportedError(f"{folder.title}: the model in numpy has no {missing}")


class ReferenceModel:
    """A model of any family with plain rotary positions and full attention; quantised weights are
    decoded.

    Raises: UnsupportedError for other models, WeightsError for damaged files.
    """

    def __init__(self, folder: ModelFolder) -> None:
        check_in_numpy(folder)
        self.config = folder.model
        rope = self.config.rope
        self._weights = _core.read_weights(core_weights(folder) or [])
        rotary_dim = rope.rotary_dim or self.config.head_dim
        self._inv_freq = rope.theta ** (-2.0 * np.arange(rotary_dim // 2) / rotary_dim)

    def read(self, token_ids: Sequence[int], room: int) -> tuple[Cache, np.ndarray]:
        """Dense causal pass over a prompt.

        Args:
            token_ids: the prompt.
            room: tokens that may follow it.

        Returns: (cache, logits after the prompt [vocab_size]).
        """
        config, n = self.config, len(token_ids)
        shape = (config.num_layers, n + room, config.num_kv_heads, config.head_dim)
        cache = Cache(np.zeros(shape, np.float32), np.zeros(shape, np.float32))

        def attend(layer: int, q: np.ndarray) -> np.ndarray:
            k, v = cache.k[layer, :n], cache.v[layer, :n]
            out = np.empty_like(q)
            for begin in range(0, n, _CHUNK):
                end = min(begin + _CHUNK, n)
                hidden = np.triu(np.full((end - begin, end), -np.inf, np.float32), k=begin + 1)
                for head in range(config.num_q_heads):
                    kv_head = head // config.group_size
                    scores = self._scores(q[begin:end, head] @ k[:end, kv_head].T) + hidden
                    out[begin:end, head] = softmax(scores) @ v[:end, kv_head]
            return out

        hidden = self._run(token_ids, cache, attend)
        return cache, self._logits(hidden[-1:])[0]

    def step(self, token_id: int, cache: Cache, attend: Attend) -> np.ndarray:
        """Appends a token; its logits: [vocab_size]."""

        def attend_rows(layer: int, q: np.ndarray) -> np.ndarray:
            n = cache.num_tokens + 1
            return attend(layer, q[0], cache.k[layer, :n], cache.v[layer, :n])[None]

        return self._logits(self._run([token_id], cache, attend_rows))[0]

    def weights_of(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Dense attention weights of one query per head: [num_q_heads, n]."""
        grouped = q.reshape(self.config.num_kv_heads, self.config.group_size, -1)
        scores = self._scores(np.einsum("gqd,ngd->gqn", grouped, k))
        return softmax(scores).reshape(self.config.num_q_heads, -1)

    def _scores(self, products: np.ndarray) -> np.ndarray:
        scale = np.float32(self.config.attention_scale or self.config.head_dim**-0.5)
        return _capped(products * scale, self.config.attention_softcap)

    def _run(
        self,
        token_ids: Sequence[int],
        cache: Cache,
        attend: Callable[[int, np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """Tokens through all layers, keys and values into the cache: [tokens, hidden_size]."""
        start, end = cache.num_tokens, cache.num_tokens + len(token_ids)
        x = self._weights["model.embed_tokens.weight"][list(token_ids)]
        x = x * np.float32(self.config.embedding_scale)
        share = np.float32(self.config.residual_scale)
        for layer in range(self.config.num_layers):
            prefix = f"model.layers.{layer}."
            normed = self._input_norm(x, prefix + "input_layernorm.weight")
            q, k, v = self._qkv(normed, layer, start)
            cache.k[layer, start:end], cache.v[layer, start:end] = k, v
            out = attend(layer, q).reshape(len(token_ids), -1)
            out = self._linear(out, prefix + "self_attn.o_proj")
            x = x + share * self._branch_norm(out, prefix + "post_self_attn_layernorm.weight")
            normed = self._input_norm(x, prefix + "post_attention_layernorm.weight")
            has_experts = bool(self.config.layers) and self.config.layers[layer].has_experts
            run = self._experts if has_experts else self._mlp
            out = run(normed, prefix + "mlp.")
            x = x + share * self._branch_norm(out, prefix + "post_mlp_layernorm.weight")
        cache.num_tokens = end
        return x

    def _input_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return self._norm(x, name) if self.config.input_norms else x

    def _branch_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return self._norm(x, name) if self.config.branch_norms else x

    def _qkv(
        self, x: np.ndarray, layer: int, start: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        prefix = f"model.layers.{layer}.self_attn."
        q, k, v = (self._linear(x, f"{prefix}{name}_proj") for name in "qkv")
        if self.config.qk_norm:
            q = self._head_norm(q, prefix + "q_norm.weight")
            k = self._head_norm(k, prefix + "k_norm.weight")
        q, k, v = (y.reshape(len(x), -1, self.config.head_dim) for y in (q, k, v))
        if not self.config.layers or self.config.layers[layer].has_rope:
            q, k = self._rotate(q, start), self._rotate(k, start)
        return q, k, v

    def _head_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """The norm of each head, or of all together: [tokens, heads * head_dim]."""
        return self._norm(x.reshape(-1, len(self._weights[name])), name).reshape(x.shape)

    def _rotate(self, x: np.ndarray, start: int) -> np.ndarray:
        """Heads [tokens, heads, head_dim] of the positions from `start` on."""
        angle = np.arange(start, start + len(x))[:, None, None] * self._inv_freq
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        half = len(self._inv_freq)
        first, second, rest = np.split(x, [half, 2 * half], axis=-1)
        if self.config.rope.interleaved:  # another order of dims, for q and k alike
            first, second = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
        turned = (first * cos - second * sin, second * cos + first * sin)
        return np.concatenate((*turned, rest), axis=-1)

    def _mlp(self, x: np.ndarray, prefix: str) -> np.ndarray:
        gate = self._linear(x, prefix + "gate_proj")
        up = self._linear(x, prefix + "up_proj")
        if self.config.activation == "gelu_tanh":
            inner = np.float32((2 / np.pi) ** 0.5) * (gate + np.float32(0.044715) * gate**3)
            gate = gate / 2 * (1 + np.tanh(inner))
        else:
            gate = gate / (1 + np.exp(-gate))
        return self._linear(gate * up, prefix + "down_proj")

    def _experts(self, x: np.ndarray, prefix: str) -> np.ndarray:
        """The most likely experts of each token, weighted."""
        logits = x @ self._weights[prefix + "gate.weight"].T
        is_sigmoid = self.config.router_score == "sigmoid"
        likely = 1 / (1 + np.exp(-logits)) if is_sigmoid else softmax(logits)
        choice = likely + self._weights.get(prefix + "gate.e_score_correction_bias", 0)
        ids = np.argsort(-choice, axis=-1, kind="stable")[:, : self.config.experts_per_token]
        weights = np.take_along_axis(likely, ids, axis=-1)
        if self.config.normalized_routing:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        weights = weights * np.float32(self.config.routing_scale)
        out = np.zeros_like(x)
        if self.config.shared_expert_size:
            out = self._mlp(x, prefix + "shared_experts.")
        if self.config.shared_expert_gate:
            out /= 1 + np.exp(-x @ self._weights[prefix + "shared_expert_gate.weight"].T)
        for expert in np.unique(ids):
            token, choice = np.nonzero(ids == expert)
            own = self._mlp(x[token], f"{prefix}experts.{expert}.")
            out[token] += weights[token, choice, None] * own
        return out

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        out = x @ self._weights[name + ".weight"].T
        bias = self._weights.get(name + ".bias")
        return out if bias is None else out + bias

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        rms = np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(self.config.rms_norm_eps))
        return x / rms * (self._weights[name] + np.float32(self.config.norm_offset))

    def _logits(self, x: np.ndarray) -> np.ndarray:
        tied = self.config.tie_word_embeddings
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        logits = self._norm(x, "model.norm.weight") @ self._weights[head].T
        return _capped(logits * np.float32(self.config.logit_scale), self.config.logit_softcap)


def _capped(x: np.ndarray, softcap: float) -> np.ndarray:
    return softcap * np.tanh(x / np.float32(softcap)) if softcap else x
