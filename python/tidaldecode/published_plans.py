"""Select layers that were published for models, and the settings that they are run with here.

Used by plans.py. The layers are others' measurements; the settings are those that answered best on
the models measured here (docs/quality.md). Neither has been measured on the user's weights, and
Decoder.plan_source says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.config import PlanConfig


@dataclass(frozen=True, kw_only=True)
class PublishedPlan:
    """Select layers and the models that they are for."""

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    vocab_size: int
    select_layers: tuple[int, ...]
    title: str  # the model that they were published for
    name_parts: tuple[str, ...] = ()  # one of them must be in the name, if there are any


# Select layers by model, from the paper's evaluation (Llama; Llama-3-8B has those of 3.1) and the
# LessIsMore release (others); all with layers 0 and 1 dense. Where shapes are shared, the more
# specific name comes first.
PUBLISHED_PLANS = (
    PublishedPlan(
        family="llama", num_layers=32, hidden_size=4096, intermediate_size=14336, num_q_heads=32,
        num_kv_heads=8, vocab_size=128256, select_layers=(2, 12),
        title="R1-Distill-Llama-8B", name_parts=("r1-distill", "deepseek"),
    ),
    PublishedPlan(
        family="llama", num_layers=32, hidden_size=4096, intermediate_size=14336, num_q_heads=32,
        num_kv_heads=8, vocab_size=128256, select_layers=(2, 13), title="Llama-3.1-8B",
    ),
    PublishedPlan(
        family="llama", num_layers=32, hidden_size=4096, intermediate_size=11008, num_q_heads=32,
        num_kv_heads=32, vocab_size=32000, select_layers=(2, 7),
        title="Llama-2-7B", name_parts=("llama-2", "llama2", "longchat", "vicuna"),
    ),
    PublishedPlan(
        family="qwen3", num_layers=36, hidden_size=4096, intermediate_size=12288, num_q_heads=32,
        num_kv_heads=8, vocab_size=151936, select_layers=(2, 12), title="Qwen3-8B",
    ),
    PublishedPlan(
        family="qwen3", num_layers=40, hidden_size=5120, intermediate_size=17408, num_q_heads=40,
        num_kv_heads=8, vocab_size=151936, select_layers=(2, 12), title="Qwen3-14B",
    ),
    PublishedPlan(
        family="qwen3", num_layers=36, hidden_size=2560, intermediate_size=9728, num_q_heads=32,
        num_kv_heads=8, vocab_size=151936, select_layers=(2, 20), title="Qwen3-4B",
    ),
)  # fmt: skip
_SHAPE_FIELDS = (
    "num_layers", "hidden_size", "intermediate_size", "num_q_heads", "num_kv_heads", "vocab_size",
)  # fmt: skip


def find_published(folder: ModelFolder) -> tuple[PlanConfig, str] | None:
    """The plan published for a model of this shape and name, and that model's title."""
    names = f"{folder.name} {folder.title}".lower()
    for known in PUBLISHED_PLANS:
        same_shape = known.family == folder.family and all(
            getattr(known, name) == getattr(folder.model, name) for name in _SHAPE_FIELDS
        )
        if same_shape and (not known.name_parts or any(part in names for part in known.name_parts)):
            return _whole_plan(known.select_layers), known.title
    return None


def _whole_plan(select_layers: tuple[int, ...]) -> PlanConfig:
    return PlanConfig(
        select_layers=select_layers,
        full_layers=2,
        token_budget=1024,
        granularity="layer",
        pooling="sum",
        sink_tokens=1,
        recent_tokens="auto",
    )
