"""The demo: a key hidden in a long text, asked for with dense and with tidal decoding.

Called by cli/app.py. demo_text.py writes the prompt, demo_view.py draws what comes out.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tidaldecode.batch import PrefillProgress
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.cli.demo_text import HiddenKey, hide_key
from tidaldecode.config import LAYER_FIELDS, PlanConfig, plan_part
from tidaldecode.decoder import Decoder
from tidaldecode.errors import InvalidArgument
from tidaldecode.plan_bytes import kv_bytes_per_step, row_bytes
from tidaldecode.plans import find_plan

DEFAULT_CONTEXTS = (4096, 16384)
# Enough steps for a steady time per token; the answer is in the first few.
_NEW_TOKENS = 24
_ANSWER_TOKENS = 5


class Reporter(Protocol):
    """Where the demo shows how far it is."""

    def loading(self, title: str) -> AbstractContextManager[PrefillProgress]:
        """A bar for bytes of weights."""

    def reading(self, title: str) -> AbstractContextManager[PrefillProgress]:
        """A bar for tokens of a prompt."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One prompt, decoded one way."""

    plan: str  # "FFSsssss"
    answer: str
    is_correct: bool
    rows_per_step: int  # rows_read_per_step()
    ms_per_token: float
    prefill_s: float
    selection: dict[int, np.ndarray]  # {layer: [num_sets, num_selected] int32}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One prompt, decoded densely and, if the model has a plan, with it."""

    prompt: HiddenKey
    dense: Run
    tidal: Run | None


def rows_read_per_step(decoder: Decoder, seq_len: int) -> int:
    """KV rows a decode step reads per KV head, summed over the layers: its bytes, in rows.

    Full and select layers read the whole cache, sparse ones their set, as plan_bytes.py counts.
    """
    config, model = decoder.config, decoder.model
    assert not isinstance(config.sparse_min_context, str)  # in use it is a number
    plan = PlanConfig()
    if seq_len > (config.sparse_min_context or 0):
        plan = plan_part(config)
    num_bytes = kv_bytes_per_step(model, plan, seq_len, config.kv_dtype)
    return round(num_bytes / row_bytes(model, config.kv_dtype))


def answer_is_correct(text: str, number: str) -> bool:
    """True if the first number in the answer is the one that was hidden."""
    found = re.search(r"\d+", text)
    return found is not None and found.group() == number


def count_in_needle(positions: np.ndarray, prompt: HiddenKey) -> int:
    """How many of the positions (any shape) are those of the hidden sentence."""
    return int(((positions >= prompt.needle_start) & (positions < prompt.needle_end)).sum())


def ask(decoder: Decoder, prompt: HiddenKey, on_prefill: PrefillProgress) -> Run:
    """Asks for the key, step by step."""

    def hits(selection: dict[int, np.ndarray]) -> int:
        return sum(count_in_needle(sets, prompt) for sets in selection.values())

    selection: dict[int, np.ndarray] = {}
    with decoder.stream(
        prompt.prompt_ids,
        max_new_tokens=_NEW_TOKENS,
        temperature=0.0,
        ignore_eos=True,
        on_prefill=on_prefill,
    ) as stream:
        for _ in stream:
            if len(stream.token_ids) <= _ANSWER_TOKENS:
                # The step of the answer that saw the key makes the picture.
                selection = max(selection, decoder.selection(0), key=hits)
    if not selection:  # the engine was ahead each time
        selection = decoder.selection(0)
    result = stream.result
    assert result is not None, "the stream has ended"
    text = result.text or ""
    rate = result.timings.decode_tokens_per_s  # the engine's: it does not wait for the reader
    return Run(
        plan=decoder.plan,
        answer=text.strip().split("\n")[0].strip(),
        is_correct=answer_is_correct(text, prompt.number),
        rows_per_step=rows_read_per_step(decoder, len(prompt.prompt_ids) + 1),
        ms_per_token=1e3 / rate if rate else 0.0,
        prefill_s=result.timings.time_to_first_token_s,
        selection=selection,
    )


def run_demo(
    model_dir: Path,
    contexts: Sequence[int],
    reporter: Reporter,
    *,
    seed: int | None = None,
    **options: Any,
) -> Iterator[Comparison]:
    """Runs the prompts densely, then with the model's plan; yields one comparison per context.

    Args:
        model_dir: any model folder.
        contexts: prompt lengths in tokens.
        reporter: shows progress.
        seed: of texts and keys; None makes new ones.
        options: further options of Decoder (device, select_layers, token_budget, ...).

    Raises: as Decoder; InvalidArgument for a context that is too short.
    """
    base_seed = secrets.randbits(32) if seed is None else seed
    too_short = [length for length in contexts if length < 256]
    if too_short:
        raise InvalidArgument(f"context: got {too_short[0]} tokens, expected at least 256")
    limits: dict[str, Any] = {"max_seq_len": max(contexts) + _NEW_TOKENS, "max_batch_size": 1}
    title = model_dir.resolve().name

    dense_options = {k: v for k, v in options.items() if k in ("device", "dtype", "num_threads")}
    with (
        reporter.loading(f"Loading {title}") as on_load,
        Decoder(model_dir, attention="full", progress=on_load, **dense_options, **limits) as dense,
    ):
        prompts = [
            hide_key(dense.encode, length, base_seed + index)
            for index, length in enumerate(contexts)
        ]
        dense_runs = [_reported_ask(dense, prompt, "dense", reporter) for prompt in prompts]

    is_asked = any(options.get(name) is not None for name in (*LAYER_FIELDS, "token_budget"))
    if not is_asked and find_plan(read_model_folder(model_dir)) is None:
        for prompt, run in zip(prompts, dense_runs, strict=True):
            yield Comparison(prompt=prompt, dense=run, tidal=None)
        return
    with (
        reporter.loading(f"Loading {title} again, with its plan") as on_load,
        Decoder(model_dir, attention="tidal", progress=on_load, **options, **limits) as tidal,
    ):
        for prompt, run in zip(prompts, dense_runs, strict=True):
            tidal_run = _reported_ask(tidal, prompt, "tidal", reporter)
            yield Comparison(prompt=prompt, dense=run, tidal=tidal_run)


def _reported_ask(decoder: Decoder, prompt: HiddenKey, way: str, reporter: Reporter) -> Run:
    with reporter.reading(f"Reading {len(prompt.prompt_ids):,} tokens, {way}") as on_prefill:
        return ask(decoder, prompt, on_prefill)
