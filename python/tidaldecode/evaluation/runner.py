"""Decodes the examples in every setting, greedily: each prompt is read once, for all settings.

Called by command.py. Results go to the file as they come; those that are there already are not
made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tidaldecode.batch import PrefillProgress
from tidaldecode.decoder import Decoder
from tidaldecode.errors import TidalError
from tidaldecode.evaluation.distributions import common_length, divergences
from tidaldecode.evaluation.example import Example
from tidaldecode.evaluation.results import Record, ResultFile
from tidaldecode.evaluation.resume import Keys
from tidaldecode.evaluation.scoring import score
from tidaldecode.evaluation.settings import Setting, dense_setting
from tidaldecode.model_folder import read_model_folder
from tidaldecode.replay import Replay


class Reporter(Protocol):
    """Where a run shows how far it is."""

    def loading(self, title: str) -> AbstractContextManager[PrefillProgress]:
        """A bar for bytes of weights."""

    def counting(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """A bar for prompts."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is to be decoded, and how."""

    model_dir: Path
    settings: Sequence[Setting]
    engine: dict[str, Any]  # options of Decoder for all settings: device, dtype, num_threads

    def decoder(self, max_seq_len: int, reporter: Reporter) -> Decoder:
        """The engine for all settings: one sequence at a time, unrecorded steps of any plan."""
        with reporter.loading(f"Loading {self.model_dir.name}") as on_load:
            return Decoder(
                self.model_dir,
                attention="full",
                max_seq_len=max_seq_len,
                max_batch_size=1,
                cuda_graphs=False,
                progress=on_load,
                **self.engine,
            )


def run(
    work: Run, examples: Sequence[Example], results: ResultFile[Record], reporter: Reporter
) -> list[Record]:
    """Decodes what is not in `results` yet.

    Returns: the records of all examples in all settings, setting by setting.
    Raises: as Decoder; TidalError if the engine gives up on a prompt.
    """
    keys = Keys(read_model_folder(work.model_dir), work.engine)
    wanted = {
        (setting.name, index): keys.of(setting, _content(example))
        for setting in work.settings
        for index, example in enumerate(examples)
    }
    missing = {place for place, key in wanted.items() if key not in results.records}
    open_examples = [
        (example, [setting for setting in work.settings if (setting.name, index) in missing], index)
        for index, example in enumerate(examples)
    ]
    open_examples = [entry for entry in open_examples if entry[1]]
    if open_examples:
        # Of all examples, so that a resumed run uses the same engine as one that was not cut off.
        room = max(len(example.prompt_ids) + example.max_new_tokens for example in examples)
        with work.decoder(room, reporter) as decoder, reporter.counting("Prompts") as on_done:
            on_done(0, len(open_examples))
            for count, (example, settings, index) in enumerate(open_examples, start=1):
                for setting, values in _decode(decoder, example, settings):
                    results.append(
                        Record(key=wanted[setting.name, index], plan=keys.plan(setting), **values)
                    )
                on_done(count, len(open_examples))
    return [results.records[key] for key in wanted.values()]


def _content(example: Example) -> list[Any]:
    return [example.task, example.index, example.context, example.digest]


def _decode(
    decoder: Decoder, example: Example, settings: Sequence[Setting]
) -> list[tuple[Setting, dict[str, Any]]]:
    """One prompt in these settings: the fields of their records but key and plan."""
    with decoder.replay([example.prompt_ids], max_new_tokens=example.max_new_tokens) as replay:
        dense = _Output(replay, example, dense_setting())
        return [
            (setting, _judged(decoder, example, setting, dense, _Output(replay, example, setting)))
            for setting in settings
        ]


class _Output:
    """What one setting writes, and what it predicts along the dense output."""

    def __init__(self, replay: Replay, example: Example, setting: Setting) -> None:
        started = time.perf_counter()
        self._replay, self._options = replay, setting.options
        (self.token_ids,) = replay.greedy(example.max_new_tokens, **setting.options)
        self.seconds = time.perf_counter() - started
        if not self.token_ids:
            raise TidalError(
                f"{example.task} {example.index}, {setting.name}: the logits after the prompt hold "
                "a NaN or infinity; check the weights, or try dtype float32"
            )

    def logits_along(self, token_ids: Sequence[int]) -> np.ndarray:
        """[len(token_ids), vocab_size] float32, each row predicting the token of its index."""
        (logits,) = self._replay.step_logits([token_ids[:-1]], **self._options)
        return logits


def _judged(
    decoder: Decoder, example: Example, setting: Setting, dense: _Output, own: _Output
) -> dict[str, Any]:
    output = decoder.decode(own.token_ids)
    if setting == dense_setting():
        kl = 0.0
    else:
        expected = dense.logits_along(dense.token_ids)
        kl = float(divergences(expected, own.logits_along(dense.token_ids)).mean())
    ends = decoder.folder.eos_token_ids
    return {
        "setting": setting.name,
        "task": example.task,
        "index": example.index,
        "context": example.context,
        "depth": example.depth,
        "score": score(example.rule, output, example.answers),
        "output": output,
        "answers": example.answers,
        "prompt_tokens": len(example.prompt_ids),
        "output_tokens": len(own.token_ids),
        "finish_reason": "stop" if own.token_ids[-1] in ends else "length",
        "same_tokens": common_length(dense.token_ids, own.token_ids),
        "kl": round(kl, 6),
        "seconds": round(own.seconds, 3),
    }
