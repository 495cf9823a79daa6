"""generation_config.json: what a model's authors suggest for sampling and where text ends.

Called by model_folder.py; sampling.py uses the values wherever a call leaves a setting out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tidaldecode.checkpoint.fields import read_bool, read_float, read_int
from tidaldecode.checkpoint.json_file import read_json_object
from tidaldecode.checkpoint.model_config import read_token_ids

FALLBACK_MAX_NEW_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Sampling settings for calls that do not give them."""

    max_new_tokens: int = FALLBACK_MAX_NEW_TOKENS
    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()


def read_generation_defaults(path: Path, vocab_size: int) -> GenerationDefaults:
    """Reads generation_config.json; an absent file gives the fallback values.

    As in transformers, temperature counts only where do_sample is true: without it a model is
    decoded greedily.

    Raises: ConfigError naming the file and the field.
    """
    if not path.is_symlink() and not path.exists():
        return GenerationDefaults()
    raw = read_json_object(path)
    where = str(path)
    samples = read_bool(raw, "do_sample", where=where, default=False)
    temperature = read_float(raw, "temperature", where=where, default=1.0, low_is_allowed=True)
    return GenerationDefaults(
        max_new_tokens=read_int(
            raw,
            "max_new_tokens",
            low=1,
            high=2**31 - 1,
            where=where,
            default=FALLBACK_MAX_NEW_TOKENS,
        ),
        temperature=temperature if samples else 0.0,
        top_k=read_int(raw, "top_k", low=0, high=2**31 - 1, where=where, default=0),
        top_p=read_float(raw, "top_p", where=where, default=1.0, high=1.0),
        min_p=read_float(raw, "min_p", where=where, default=0.0, high=1.0, low_is_allowed=True),
        repetition_penalty=read_float(raw, "repetition_penalty", where=where, default=1.0),
        eos_token_ids=read_token_ids(raw, "eos_token_id", vocab_size, where),
    )
