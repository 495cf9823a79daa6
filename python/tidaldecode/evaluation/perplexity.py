"""Perplexity where it counts: windows of a text, their last tokens predicted by decode steps.

Called by command.py. Scores of a prefill alone would say nothing of sparse decoding, which begins
behind the prompt; so the front of every window is read, and the true next tokens are fed one step
at a time, in every setting.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.decoder import Decoder
from tidaldecode.errors import InvalidArgument
from tidaldecode.evaluation.costs import StepCosts
from tidaldecode.evaluation.distributions import divergences, same_choices, token_losses
from tidaldecode.evaluation.example import Encode
from tidaldecode.evaluation.results import LossRecord, ResultFile
from tidaldecode.evaluation.resume import Keys, missing
from tidaldecode.evaluation.runner import Prompt, Reporter, Run
from tidaldecode.evaluation.settings import Setting, dense_setting

SCORED_TOKENS = 256  # of every window
_MOST_NATS = 500.0  # beyond it a perplexity is no number any more


@dataclass(frozen=True, kw_only=True)
class Window:
    """A stretch of text: what is read, and what is predicted."""

    context: int  # tokens of both together
    index: int
    prompt_ids: tuple[int, ...]
    scored_ids: tuple[int, ...]


def read_text(path: Path) -> str:
    """A text file.

    Raises: InvalidArgument if it cannot be read or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as cause:
        raise InvalidArgument(f"text: {path}: {cause.strerror}; expected a text file") from cause
    except UnicodeDecodeError as cause:
        raise InvalidArgument(f"text: {path} is not UTF-8 (byte {cause.start})") from cause


def make_windows(
    text: str,
    encode: Encode,
    contexts: Sequence[int],
    *,
    count: int,
    scored_tokens: int = SCORED_TOKENS,
) -> list[Window]:
    """Windows spread evenly over the text, no token predicted twice at one context.

    Args:
        text: what is to be predicted.
        encode: token ids of a prompt; what it puts in front of a text goes in front of a window.
        contexts: tokens of a window.
        count: windows at each context; fewer where the text ends.
        scored_tokens: how many are predicted.

    Raises: InvalidArgument for a context that is too short or a text that is.
    """
    front = encode("")
    ids = encode(text)[len(front) :]
    windows = []
    for context in contexts:
        length = context - len(front)
        if length <= scored_tokens:
            raise InvalidArgument(
                f"context: got {context}, expected more than {scored_tokens + len(front)} for "
                "perplexity"
            )
        if len(ids) < length:
            raise InvalidArgument(
                f"text: got {len(ids)} tokens, expected at least {length} for a context of "
                f"{context}; give a longer text or a shorter context"
            )
        spare = len(ids) - length
        possible = min(count, 1 + spare // scored_tokens)
        for index in range(possible):
            begin = spare * index // max(1, possible - 1)
            piece = ids[begin : begin + length]
            windows.append(
                Window(
                    context=context,
                    index=index,
                    prompt_ids=(*front, *piece[:-scored_tokens]),
                    scored_ids=tuple(piece[-scored_tokens:]),
                )
            )
    return windows


def run_windows(
    work: Run, windows: Sequence[Window], results: ResultFile[LossRecord], reporter: Reporter
) -> list[LossRecord]:
    """Predicts what is not in `results` yet.

    Returns: the records of all windows in all settings, setting by setting.
    Raises: as Decoder.
    """
    keys = Keys(read_model_folder(work.model_dir), work.engine)
    wanted = [
        keys.wanted(work.settings, window.context, [window.prompt_ids, window.scored_ids])
        for window in windows
    ]
    open_windows = [
        (window, new)
        for window, own in zip(windows, wanted, strict=True)
        if (new := missing(own, results.records))
    ]
    if open_windows:
        room = max(window.context for window in windows)
        with work.decoder(room, reporter) as decoder, reporter.counting("Windows") as on_done:
            on_done(0, len(open_windows))
            for count, (window, new) in enumerate(open_windows, start=1):
                found = _losses(decoder, window, list(new.values()), reporter)
                for key, (setting, values) in zip(new, found, strict=True):
                    results.append(LossRecord(key=key, plan=keys.plan(setting), **values))
                on_done(count, len(open_windows))
    # The key says whose a record is, whatever else has been written into the file.
    records = [
        replace(results.records[key], setting=setting.name, context=window.context, window=index)
        for index, (window, own) in enumerate(zip(windows, wanted, strict=True))
        for setting, key in own
    ]
    names = [setting.name for setting in work.settings]
    return sorted(records, key=lambda record: names.index(record.setting))


def _losses(
    decoder: Decoder, window: Window, settings: Sequence[Setting], reporter: Reporter
) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """One window in these settings: the fields of their records but key and plan."""
    with Prompt(decoder, window.prompt_ids, len(window.scored_ids), reporter) as prompt:
        dense, dense_seconds = _predicted(prompt, window, dense_setting())
        for setting in settings:
            logits, seconds, set_size = dense, dense_seconds, 0.0
            if setting != dense_setting():
                logits, seconds = _predicted(prompt, window, setting)
                set_size = prompt.set_size(setting)
            yield (
                setting,
                {
                    "setting": setting.name,
                    "context": window.context,
                    "window": window.index,
                    "num_tokens": len(window.scored_ids),
                    "loss": round(float(token_losses(logits, window.scored_ids).mean()), 6),
                    "kl": round(float(divergences(dense, logits).mean()), 6),
                    "agreement": round(float(same_choices(dense, logits).mean()), 6),
                    "set_size": set_size,
                    "seconds": round(seconds, 3),
                },
            )


def _predicted(prompt: Prompt, window: Window, setting: Setting) -> tuple[np.ndarray, float]:
    """Logits [len(scored_ids), vocab_size] that predict the scored tokens, and seconds."""
    started = time.perf_counter()
    logits = prompt.logits(setting, window.scored_ids)
    return logits, time.perf_counter() - started


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """One setting on all windows of one context."""

    setting: str
    plan: str
    context: int
    num_tokens: int
    perplexity: float
    over_dense: float  # share by which it is higher than the dense one
    kl: float  # nats
    agreement: float  # share of steps whose most likely token is the dense one
    set_size: float  # positions of a set, mean; 0 where all steps are dense
    kv_bytes: int | None = None  # of keys and values that a step reads; None: not counted


def summarise_losses(
    records: Sequence[LossRecord], costs: StepCosts | None = None
) -> list[Perplexity]:
    """One entry per setting and context, in the order of the records, the first being dense."""
    groups: dict[tuple[str, int], list[LossRecord]] = {}
    for record in records:
        groups.setdefault((record.setting, record.context), []).append(record)
    dense_name = records[0].setting if records else ""
    summaries = []
    for (setting, context), own in groups.items():
        loss = fmean(record.loss for record in own)
        dense_loss = fmean(record.loss for record in groups[dense_name, context])
        summaries.append(
            Perplexity(
                setting=setting,
                plan=own[0].plan,
                context=context,
                num_tokens=sum(record.num_tokens for record in own),
                perplexity=math.exp(min(loss, _MOST_NATS)),
                over_dense=math.expm1(min(loss - dense_loss, _MOST_NATS)),
                kl=fmean(record.kl for record in own),
                agreement=fmean(record.agreement for record in own),
                set_size=fmean(record.set_size for record in own),
                kv_bytes=round(fmean(map(costs.of, own))) if costs else None,
            )
        )
    return summaries
