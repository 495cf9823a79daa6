"""generation_config.json: what a model's authors suggest for sampling and where text ends.

Called by model_folder.py; sampling.py uses the values wherever a call leaves a setting out. The
file means what it means to transformers (generation/configuration_utils.py and utils.py there), as
far as the engine has the setting; what it has not is noted by name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidaldecode._core import MAX_REPETITION_PENALTY
from tidaldecode.checkpoint.fields import read_bool, read_float, read_int
from tidaldecode.checkpoint.json_file import read_json_object
from tidaldecode.checkpoint.model_config import read_token_ids
from tidaldecode.errors import ConfigError, show

FALLBACK_MAX_NEW_TOKENS = 256
_MAX_INT = 2**31 - 1
# A share that the most likely token alone always reaches: transformers keeps one token at top_p 0.
_ONE_TOKEN = 1e-9

# Settings that change the text in transformers and are not applied here, with the values besides
# null that mean "off".
_UNAPPLIED: dict[str, tuple[Any, ...]] = {
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_decoder_ids": ([],),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ([], {}),
    "stop_strings": ([], ""),
    "token_healing": (False,),
    "watermarking_config": (),
}
# The same, of those that only count where tokens are drawn (do_sample).
_UNAPPLIED_DRAWS: dict[str, tuple[Any, ...]] = {
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "typical_p": (1,),
}


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Sampling settings for calls that do not give them."""

    max_new_tokens: int = FALLBACK_MAX_NEW_TOKENS
    max_length: int | None = None  # of prompt and output; counts where the file alone limits these
    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()  # for the user: what was not taken as it stands


def read_generation_defaults(path: Path, vocab_size: int) -> GenerationDefaults:
    """Reads generation_config.json; an absent file gives the fallback values.

    As in transformers, temperature counts only where do_sample is true, for without it a model is
    decoded greedily; and where there is no such file, config.json beside it counts, in which older
    models have these settings.

    Raises: ConfigError naming the file and the field.
    """
    if not os.path.lexists(path):
        path = path.with_name("config.json")
    if not os.path.lexists(path):
        return GenerationDefaults()
    raw = read_json_object(path)
    where = str(path)
    samples = read_bool(raw, "do_sample", where=where, default=False)
    temperature = 0.0
    if samples:
        temperature = read_float(raw, "temperature", where=where, default=1.0, low_is_allowed=True)
    max_new_tokens, max_length = _read_lengths(raw, where)
    ngram_size = read_int(raw, "no_repeat_ngram_size", low=0, high=_MAX_INT, where=where, default=0)
    eos_token_ids, notes = read_token_ids(raw, "eos_token_id", vocab_size, where)
    top_p = read_float(raw, "top_p", where=where, default=1.0, low_is_allowed=True)
    return GenerationDefaults(
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        temperature=temperature,
        top_k=max(0, read_int(raw, "top_k", low=-_MAX_INT, high=_MAX_INT, where=where, default=0)),
        top_p=min(max(top_p, _ONE_TOKEN), 1.0),  # more than 1 is off in transformers
        min_p=read_float(raw, "min_p", where=where, default=0.0, high=1.0, low_is_allowed=True),
        repetition_penalty=read_float(
            raw,
            "repetition_penalty",
            where=where,
            default=1.0,
            low=1 / MAX_REPETITION_PENALTY,
            high=MAX_REPETITION_PENALTY,
            low_is_allowed=True,
        ),
        min_new_tokens=read_int(
            raw, "min_new_tokens", low=0, high=_MAX_INT, where=where, default=0
        ),
        no_repeat_ngram_size=ngram_size,
        suppress_tokens=_known(raw.get("suppress_tokens"), vocab_size, f"{where}: suppress_tokens"),
        bad_words=_read_bad_words(raw, vocab_size, where),
        eos_token_ids=eos_token_ids,
        notes=(*notes, *_unapplied_notes(raw, samples, where)),
    )


def _known(ids: Any, vocab_size: int, where: str) -> tuple[int, ...]:
    """The ids of a list that a row of the vocabulary has; any other is never drawn anyhow."""
    if ids is None:
        return ()
    if not isinstance(ids, list):
        raise ConfigError(f"{where}: got {show(ids)}, expected a list of token ids")
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise ConfigError(f"{where}: got {show(token_id)}, expected a list of token ids")
    return tuple(token_id for token_id in ids if 0 <= token_id < vocab_size)


def _read_bad_words(
    raw: Mapping[str, Any], vocab_size: int, where: str
) -> tuple[tuple[int, ...], ...]:
    words = raw.get("bad_words_ids")
    if words is None:
        return ()
    place = f"{where}: bad_words_ids"
    if not isinstance(words, list) or not all(isinstance(w, list) and w for w in words):
        raise ConfigError(f"{place}: got {show(words)}, expected a list of lists of token ids")
    rows = [(word, _known(word, vocab_size, place)) for word in words]
    return tuple(row for word, row in rows if len(row) == len(word))


def _read_lengths(raw: Mapping[str, Any], where: str) -> tuple[int, int | None]:
    """max_new_tokens, and max_length where it counts: where max_new_tokens is not given."""

    def read(key: str) -> int | None:
        value: int | None = read_int(raw, key, low=1, high=2**63 - 1, where=where, default=None)
        return None if value is None else min(value, _MAX_INT)

    max_new_tokens = read("max_new_tokens")
    if max_new_tokens is not None:
        return max_new_tokens, None
    max_length = read("max_length")
    return max_length or FALLBACK_MAX_NEW_TOKENS, max_length


def _unapplied_notes(raw: Mapping[str, Any], samples: bool, where: str) -> Iterable[str]:
    table = _UNAPPLIED | (_UNAPPLIED_DRAWS if samples else {})
    names = [
        name for name, off in table.items() if raw.get(name) is not None and raw[name] not in off
    ]
    if names:
        yield (
            f"{where}: {', '.join(names)}: not applied here, so the text can differ from what "
            "transformers gives"
        )
