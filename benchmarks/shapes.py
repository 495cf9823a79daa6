"""Models that bench_decode.py measures without their weights: config.json and what to measure.

The configs are the published ones, field by field, as far as the engine reads them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# A step over so few tokens reads next to nothing of a cache: what is left is everything but
# attention, though all of its launches are there.
NEARLY_EMPTY = 16

Point = tuple[int, int]  # context, batch size


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model to build from random weights."""

    name: str
    config: dict[str, Any]
    points: tuple[Point, ...]
    select_layers: tuple[int, ...] | None = None  # None: the package's table knows it by its shape
    notes: dict[str, Any] = field(default_factory=dict)
    # Whether peers.py runs its heads too; each size of head costs FlashInfer a minute of compiling.
    with_peers: bool = True

    def for_contexts(self, longest: int) -> Shape:
        """The same model, with as many positions as are measured."""
        real = self.config["max_position_embeddings"]
        if longest <= real:
            return self
        raised = {"real": real, "raised for the benchmark to": longest}
        return replace(
            self,
            config=self.config | {"max_position_embeddings": longest},
            notes=self.notes | {"max_position_embeddings": raised},
        )

    def write(self, parent: Path) -> Path:
        """A model folder that holds nothing but config.json."""
        folder = parent / self.name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1))
        return folder


def _config(family: str, **values: Any) -> dict[str, Any]:
    names = {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "intermediate": "intermediate_size",
        "q_heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "vocab": "vocab_size",
        "positions": "max_position_embeddings",
        "theta": "rope_theta",
        "eps": "rms_norm_eps",
        "tied": "tie_word_embeddings",
        "dtype": "torch_dtype",
    }
    architecture = {
        "llama": "LlamaForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "qwen3_moe": "Qwen3MoeForCausalLM",
        "glm4_moe": "Glm4MoeForCausalLM",
        "gpt_oss": "GptOssForCausalLM",
        "granite": "GraniteForCausalLM",
        "gemma3_text": "Gemma3ForCausalLM",
    }[family]
    fields = {names.get(key, key): value for key, value in values.items()}
    return {"architectures": [architecture], "model_type": family, "hidden_act": "silu", **fields}


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

_ALL = (
    Shape(
        name="llama-3.1-8b",
        config=_config(
            "llama", layers=32, hidden=4096, intermediate=14336, q_heads=32, kv_heads=8,
            vocab=128256, positions=131072, theta=500000.0, rope_scaling=_llama3_rope(8.0),
            eps=1e-5, tied=False, dtype="bfloat16",
        ),
        points=(
            (NEARLY_EMPTY, 1), (10240, 1), (32768, 1), (131072, 1), (131072, 4),
            (NEARLY_EMPTY, 8), (10240, 8), (32768, 8),
        ),
    ),
    Shape(
        name="llama-2-7b",
        config=_config(
            "llama", layers=32, hidden=4096, intermediate=11008, q_heads=32, kv_heads=32,
            vocab=32000, positions=4096, theta=10000.0, eps=1e-5, tied=False, dtype="float16",
        ),
        points=(
            (NEARLY_EMPTY, 1), (10240, 1), (32768, 1), (102400, 1),
            (NEARLY_EMPTY, 8), (4096, 8), (10240, 8),
        ),
    ),
    Shape(
        name="qwen3-8b",
        config=_config(
            "qwen3", layers=36, hidden=4096, intermediate=12288, q_heads=32, kv_heads=8,
            head_dim=128, vocab=151936, positions=40960, theta=1000000.0, eps=1e-6, tied=False,
            dtype="bfloat16",
        ),
        points=(
            (NEARLY_EMPTY, 1), (10240, 1), (32768, 1), (NEARLY_EMPTY, 8), (10240, 8), (32768, 8),
        ),
    ),
    Shape(
        name="llama-3.2-1b",
        config=_config(
            "llama", layers=16, hidden=2048, intermediate=8192, q_heads=32, kv_heads=8,
            head_dim=64, vocab=128256, positions=131072, theta=500000.0,
            rope_scaling=_llama3_rope(32.0), eps=1e-5, tied=True, dtype="bfloat16",
        ),
        points=(
            (NEARLY_EMPTY, 1), (10240, 1), (32768, 1), (131072, 1),
            (NEARLY_EMPTY, 8), (10240, 8), (32768, 8),
        ),
        select_layers=(2, 7),
        notes={"about": "no published plan: layers 2 and 7 stand for one"},
        with_peers=False,
    ),
    Shape(
        name="llama-3.3-70b",
        config=_config(
            "llama", layers=80, hidden=8192, intermediate=28672, q_heads=64, kv_heads=8,
            vocab=128256, positions=131072, theta=500000.0, rope_scaling=_llama3_rope(8.0),
            eps=1e-5, tied=False, dtype="bfloat16",
        ),
        points=((NEARLY_EMPTY, 1), (131072, 1)),
        select_layers=(2, 31),
        notes={"about": "no published plan: layers 2 and 31 stand for one; needs 8-bit weights"},
        with_peers=False,
    ),
    Shape(
        name="qwen3-30b-a3b",
        config=_config(
            "qwen3_moe", layers=48, hidden=2048, intermediate=6144, q_heads=32, kv_heads=4,
            head_dim=128, vocab=151936, positions=262144, theta=10000000.0, eps=1e-6, tied=False,
            dtype="bfloat16", num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
            norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        ),
        points=((NEARLY_EMPTY, 1), (131072, 1), (NEARLY_EMPTY, 8), (32768, 8), (131072, 4)),
        select_layers=(2, 19),
        notes={"about": "no published plan: layers 2 and 19 stand for one"},
        with_peers=False,
    ),
    Shape(
        name="glm-4.5-air",
        config=_config(
            "glm4_moe", layers=46, hidden=4096, intermediate=10944, q_heads=96, kv_heads=8,
            head_dim=128, vocab=151552, positions=131072, theta=1000000.0, eps=1e-5, tied=False,
            dtype="bfloat16", n_routed_experts=128, num_experts_per_tok=8, n_shared_experts=1,
            moe_intermediate_size=1408, norm_topk_prob=True, first_k_dense_replace=1,
            routed_scaling_factor=1.0, attention_bias=True, partial_rotary_factor=0.5,
        ),
        points=((NEARLY_EMPTY, 1), (131072, 1), (NEARLY_EMPTY, 4), (32768, 4)),
        select_layers=(2, 18),
        notes={
            "about": "no published plan: layers 2 and 18 stand for one; needs 4-bit weights "
            "(--weight-format int4)",
        },
        with_peers=False,
    ),
    Shape(
        name="gpt-oss-20b",
        config=_config(
            "gpt_oss", layers=24, hidden=2880, intermediate=2880, q_heads=64, kv_heads=8,
            head_dim=64, vocab=201088, positions=131072, theta=150000.0, eps=1e-5, tied=False,
            dtype="bfloat16", num_local_experts=32, num_experts_per_tok=4, attention_bias=True,
            sliding_window=128, layer_types=["sliding_attention", "full_attention"] * 12,
            swiglu_limit=7.0, rope_scaling=_GPT_OSS_ROPE,
        ),
        points=((NEARLY_EMPTY, 1), (131072, 1), (NEARLY_EMPTY, 8), (32768, 8), (131072, 4)),
        select_layers=(3, 13),
        notes={
            "about": "no published plan: layers 3 and 13, of those without a window, stand for "
            "one; its checkpoint has MXFP4 (--weight-format mxfp4)",
        },
        with_peers=False,
    ),
    Shape(
        name="gemma-3-12b",
        config=_config(
            "gemma3_text", layers=48, hidden=3840, intermediate=15360, q_heads=16, kv_heads=8,
            head_dim=256, vocab=262208, positions=131072, theta=1000000.0, eps=1e-6, tied=True,
            dtype="bfloat16", rope_local_base_freq=10000.0, sliding_window=1024,
            layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 8,
            query_pre_attn_scalar=256, hidden_activation="gelu_pytorch_tanh",
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
        points=((NEARLY_EMPTY, 1), (131072, 1), (NEARLY_EMPTY, 8), (32768, 8), (131072, 4)),
        select_layers=(5, 23),
        notes={"about": "no published plan: layers 5 and 23, of those without a window"},
        with_peers=False,
    ),
    Shape(
        name="granite-3.3-8b",
        config=_config(
            "granite", layers=40, hidden=4096, intermediate=12800, q_heads=32, kv_heads=8,
            vocab=49159, positions=131072, theta=10000000.0, eps=1e-5, tied=True, dtype="bfloat16",
            embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.0078125,
            logits_scaling=16.0,
        ),
        points=((NEARLY_EMPTY, 1), (131072, 1), (NEARLY_EMPTY, 8), (32768, 8)),
        select_layers=(2, 15),
        notes={"about": "no published plan: layers 2 and 15 stand for one"},
        with_peers=False,
    ),
    Shape(
        name="tiny",
        config=_config(
            "llama", layers=8, hidden=256, intermediate=512, q_heads=8, kv_heads=2, head_dim=64,
            vocab=1024, positions=16384, theta=10000.0, eps=1e-5, tied=False, dtype="bfloat16",
        ),
        points=(
            (NEARLY_EMPTY, 1), (2048, 1), (4096, 1), (16384, 1),
            (NEARLY_EMPTY, 8), (2048, 8), (4096, 8),
        ),
        select_layers=(2, 5),
        notes={"about": "no real model: for trying the benchmark out"},
    ),
)  # fmt: skip
SHAPES = {shape.name: shape for shape in _ALL}
DEFAULT_SHAPES = ("llama-3.1-8b", "llama-2-7b", "qwen3-8b", "llama-3.2-1b")
