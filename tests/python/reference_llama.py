"""A plain numpy decoder with TidalDecode's sparse steps: the oracle of test_reference_tidal.py.

Written from the definition of the algorithm (docs/algorithm.md; TidalDecode, arXiv 2410.05076) and
from nothing of the engine: no pages, no chunks, no batches, every softmax over a whole row, all in
float64.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from reference_shadow import NUM_TOKENS, balance_of, random_tokens, shadow_scores
from tiny_models import round_to


@dataclass(frozen=True)
class TidalSettings:
    """How decode steps attend. Without layers that choose every step is dense."""

    select_layers: tuple[int, ...] = ()
    full_layers: int = 2
    token_budget: int = 16
    granularity: str = "kv_head"
    pooling: str = "sum"
    sink_tokens: int = 1
    recent_tokens: int = 1
    sparse_min_context: int = 0
    top_p_mass: float = 1.0
    min_token_budget: int | None = None  # with top_p_mass
    scored_layers: tuple[int, ...] = ()
    shadow: str = "none"

    def options(self) -> dict[str, Any]:
        """What a Decoder is given: no list of layers that is empty."""
        return {name: value for name, value in asdict(self).items() if value != ()}


@dataclass
class Cache:
    """Keys (rotated) and values of one layer: [num_tokens, num_kv_heads, head_dim]."""

    k: np.ndarray
    v: np.ndarray


@dataclass
class DecodeResult:
    token_ids: list[int]
    logits: list[np.ndarray]  # the row each token was chosen from
    selection: dict[int, np.ndarray] = field(default_factory=dict)  # of the last sparse step


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def plan_letters(num_layers: int, settings: TidalSettings) -> str:
    """One letter a layer: F full, S select, P scored, s sparse."""
    letters = ["s"] * num_layers
    for layer in settings.select_layers:
        letters[layer] = "S"
    for layer in settings.scored_layers:
        letters[layer] = "P"
    plan = "".join(letters)
    return "F" * (num_layers - len(plan.lstrip("s"))) + plan.lstrip("s")


def choose_positions(
    scores: np.ndarray,
    num_kv_heads: int,
    settings: TidalSettings,
) -> np.ndarray:
    """The set(s) of one step.

    Args:
        scores: [num_q_heads, n], sm_scale * q.k of the newest token with all n positions.

    Returns:
        [num_sets, size of the largest] positions, ascending; -1 past the end of a smaller set.
    """
    num_q_heads, n = scores.shape
    pool = {"sum": np.sum, "max": np.max}[settings.pooling]
    weights_of = softmax(scores)
    if settings.granularity == "head":
        ranked = scores
    elif settings.granularity == "kv_head":
        groups = weights_of.reshape(num_kv_heads, num_q_heads // num_kv_heads, n)
        ranked = pool(groups, axis=1)
    else:
        ranked = pool(weights_of, axis=0, keepdims=True)
    budget = min(settings.token_budget, n)
    num_sets = len(ranked)
    mass = weights_of.reshape(num_sets, -1, n).sum(axis=1)
    target = settings.top_p_mass * num_q_heads / num_sets
    chosen = np.zeros(ranked.shape, bool)
    chosen[:, : settings.sink_tokens] = True
    chosen[:, n - settings.recent_tokens :] = True
    for row, values, weights in zip(chosen, ranked, mass, strict=True):
        order = np.argsort(-values, kind="stable")  # stable: the lower of two equals comes first
        for position in order:
            enough = weights[row].sum() >= target and settings.top_p_mass < 1.0
            if row.sum() == budget or (enough and row.sum() >= settings.min_token_budget):
                break
            row[position] = True
    sets = np.full((num_sets, chosen.sum(axis=1).max()), -1)
    for positions, row in zip(sets, chosen, strict=True):
        positions[: row.sum()] = np.flatnonzero(row)
    return sets


FLOAT32_NOISE = 1e-6


class ReferenceLlama:
    """Llama, Mistral, Qwen2 or Qwen3 with rope type default, linear or llama3.

    `kv_dtype` rounds keys and values as a cache of that type would.

    What float32 computes in another order may fall to the other side of a rounding: `noise` adds
    FLOAT32_NOISE of the largest number to what is rounded to codes.
    """

    noise: np.random.Generator | None = None

    def __init__(self, config: dict, weights: dict[str, np.ndarray], kv_dtype: str = "float32"):
        self.num_layers = config["num_hidden_layers"]
        self.num_q_heads = config["num_attention_heads"]
        self.num_kv_heads = config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.num_q_heads
        self.eps = config["rms_norm_eps"]
        self.kv_dtype = kv_dtype
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}
        self.weights.setdefault("lm_head.weight", self.weights["model.embed_tokens.weight"])
        self.inv_freq = self._inv_freq(config.get("rope_parameters", config))
        self.balance = self.shadow_balance()

    def _inv_freq(self, rope: dict) -> np.ndarray:
        half = np.arange(self.head_dim // 2)
        inv_freq = rope["rope_theta"] ** (-2.0 * half / self.head_dim)
        kind = rope.get("rope_type", "default")
        if kind == "linear":
            return inv_freq / rope["factor"]
        if kind == "llama3":
            # Long waves are slowed down, short ones kept, those between are blended.
            turns = rope["original_max_position_embeddings"] * inv_freq / (2 * np.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
            return keep * inv_freq + (1.0 - keep) * inv_freq / rope["factor"]
        assert kind == "default", kind
        return inv_freq

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        out = x @ self.weights[name + ".weight"].T
        return out + self.weights.get(name + ".bias", 0.0)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        rms = np.sqrt((x * x).mean(-1, keepdims=True) + self.eps)
        return x / rms * self.weights[name]

    def _rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        angle = positions[:, None, None] * self.inv_freq
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate(
            (first * np.cos(angle) - second * np.sin(angle),
             second * np.cos(angle) + first * np.sin(angle)), axis=-1)  # fmt: skip

    def _qkv(
        self, x: np.ndarray, layer: int, start: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k, v of the tokens x: [num_tokens, heads, head_dim], q and k rotated."""
        attention = f"model.layers.{layer}.self_attn."
        q, k, v = (
            self._linear(x, f"{attention}{name}_proj").reshape(len(x), -1, self.head_dim)
            for name in "qkv"
        )
        if attention + "q_norm.weight" in self.weights:
            q = self._norm(q, attention + "q_norm.weight")
            k = self._norm(k, attention + "k_norm.weight")
        positions = np.arange(start, start + len(x))
        k = self._round(self._rotate(k, positions), attention + "k_scale")
        v = self._round(v, attention + "v_scale")
        return self._rotate(q, positions), k, v

    def _round(self, kv: np.ndarray, scale_name: str) -> np.ndarray:
        if self.kv_dtype == "float32":
            return kv
        kv = self._noisy(kv)
        if self.kv_dtype == "fp8":
            scale = self.weights.get(scale_name, np.float64(1.0))
            return round_to(kv / scale, "fp8").astype(np.float64) * scale
        if self.kv_dtype == "int8":
            kv = kv.astype(np.float32)
            scale = np.abs(kv).max(-1, keepdims=True) / np.float32(127)
            return (np.round(kv / scale) * scale).astype(np.float64)
        return round_to(kv.astype(np.float32), self.kv_dtype).astype(np.float64)

    def _noisy(self, numbers: np.ndarray) -> np.ndarray:
        if self.noise is None:
            return numbers
        scale = FLOAT32_NOISE * np.abs(numbers).max()
        return numbers + scale * self.noise.standard_normal(numbers.shape)

    def _mlp(self, x: np.ndarray, layer: int) -> np.ndarray:
        prefix = f"model.layers.{layer}.mlp."
        gate = self._linear(x, prefix + "gate_proj")
        up = self._linear(x, prefix + "up_proj")
        return self._linear(gate / (1.0 + np.exp(-gate)) * up, prefix + "down_proj")

    def _kv_head(self, q_head: int) -> int:
        return q_head // (self.num_q_heads // self.num_kv_heads)

    def shadow_balance(self) -> list[np.ndarray]:
        """The factors of shadow keys, by layer."""
        vocab_size = len(self.weights["model.embed_tokens.weight"])
        queries: list[np.ndarray] = []
        _, caches = self.prefill(random_tokens(NUM_TOKENS, vocab_size), queries)
        return [balance_of(cache.k, q) for cache, q in zip(caches, queries, strict=True)]

    def prefill(
        self, token_ids: list[int], queries: list[np.ndarray] | None = None
    ) -> tuple[np.ndarray, list[Cache]]:
        """Dense causal pass. Returns logits [num_tokens, vocab_size] and the caches.

        `queries` gets those of every layer: [num_tokens, num_q_heads, head_dim].
        """
        x = self.weights["model.embed_tokens.weight"][token_ids]
        n, caches = len(token_ids), []
        hidden_future = np.triu(np.full((n, n), -np.inf), k=1)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            q, k, v = self._qkv(self._norm(x, prefix + "input_layernorm.weight"), layer, 0)
            if queries is not None:
                queries.append(q)
            out = np.empty_like(q)
            for head in range(self.num_q_heads):
                kv_head = self._kv_head(head)
                scores = q[:, head] @ k[:, kv_head].T / np.sqrt(self.head_dim) + hidden_future
                out[:, head] = softmax(scores) @ v[:, kv_head]
            x = x + self._linear(out.reshape(n, -1), prefix + "self_attn.o_proj")
            x = x + self._mlp(self._norm(x, prefix + "post_attention_layernorm.weight"), layer)
            caches.append(Cache(k, v))
        return self._logits(x), caches

    def _logits(self, x: np.ndarray) -> np.ndarray:
        return self._norm(x, "model.norm.weight") @ self.weights["lm_head.weight"].T

    def step(
        self, token_id: int, caches: list[Cache], settings: TidalSettings
    ) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Appends one token. Returns its logits [vocab_size] and what each choosing layer chose."""
        n = len(caches[0].k) + 1
        is_adaptive = settings.top_p_mass < 1.0
        always_taken = settings.min_token_budget if is_adaptive else settings.token_budget
        dense = n <= max(always_taken, settings.sparse_min_context)
        letters = plan_letters(self.num_layers, TidalSettings() if dense else settings)
        x = self.weights["model.embed_tokens.weight"][[token_id]]
        selection: dict[int, np.ndarray] = {}
        chosen = np.empty((0, 0), int)
        for layer, kind in enumerate(letters):
            prefix = f"model.layers.{layer}."
            q, k, v = self._qkv(self._norm(x, prefix + "input_layernorm.weight"), layer, n - 1)
            cache = caches[layer]
            cache.k, cache.v = np.concatenate((cache.k, k)), np.concatenate((cache.v, v))
            scores = np.stack([
                cache.k[:, self._kv_head(head)] @ q[0, head] / np.sqrt(self.head_dim)
                for head in range(self.num_q_heads)
            ])  # fmt: skip
            if kind in "SP":
                seen = scores
                if kind == "P" and settings.shadow == "int4":
                    queries, keys = self._noisy(q[0]), self._noisy(cache.k)
                    seen = shadow_scores(queries, keys, self.balance[layer])
                    seen = seen / np.sqrt(self.head_dim)
                chosen = choose_positions(seen, self.num_kv_heads, settings)
                selection[layer] = chosen
            out = np.empty_like(q[0])
            for head in range(self.num_q_heads):
                kv_head = self._kv_head(head)
                positions = np.arange(n)
                if kind in "sP":
                    owner = {"kv_head": kv_head, "head": head, "layer": 0}[settings.granularity]
                    positions = chosen[owner][chosen[owner] >= 0]
                out[head] = softmax(scores[head, positions]) @ cache.v[positions, kv_head]
            x = x + self._linear(out.reshape(1, -1), prefix + "self_attn.o_proj")
            x = x + self._mlp(self._norm(x, prefix + "post_attention_layernorm.weight"), layer)
        return self._logits(x)[0], selection

    def generate(
        self, prompt: list[int], max_new_tokens: int, settings: TidalSettings
    ) -> DecodeResult:
        """Greedy decoding; the lower id wins a tie."""
        prefill_logits, caches = self.prefill(prompt)
        result = DecodeResult([int(prefill_logits[-1].argmax())], [prefill_logits[-1]])
        while len(result.token_ids) < max_new_tokens:
            logits, selection = self.step(result.token_ids[-1], caches, settings)
            result.selection = selection or result.selection
            result.token_ids.append(int(logits.argmax()))
            result.logits.append(logits)
        return result
