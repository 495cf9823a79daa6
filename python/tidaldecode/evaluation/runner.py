"""Decodes the examples in every setting, greedily: each prompt is read once, for all settings.

Called by command.py. Results go to the file as they come; those that are there already are not
made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tidaldecode.batch import PrefillProgress
from tidaldecode.checkpoint.model_folder import ModelFolder, read_model_folder
from tidaldecode.decoder import Decoder
from tidaldecode.errors import OutOfMemoryError
from tidaldecode.evaluation.distributions import common_length, divergences, unusable_logits
from tidaldecode.evaluation.example import Example
from tidaldecode.evaluation.quest import QuestReplay
from tidaldecode.evaluation.reference import ReferenceModel
from tidaldecode.evaluation.results import Record, ResultFile
from tidaldecode.evaluation.resume import Keys, Wanted, missing
from tidaldecode.evaluation.scoring import score
from tidaldecode.evaluation.settings import Setting, dense_setting


class Reporter(Protocol):
    """Where a run shows how far it is."""

    def loading(self, title: str) -> AbstractContextManager[PrefillProgress]:
        """A bar for bytes of weights."""

    def reading(self, title: str) -> AbstractContextManager[PrefillProgress]:
        """A bar for tokens of a prompt, inside another."""

    def counting(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """A bar for prompts."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is to be decoded, and how."""

    model_dir: Path
    settings: Sequence[Setting]
    engine: dict[str, Any]  # options of Decoder for all settings: device, dtype, num_threads

    def decoder(self, max_seq_len: int, reporter: Reporter) -> Decoder:
        """The engine for all settings: one sequence at a time, steps of any plan."""
        with reporter.loading(f"Loading {self.model_dir.name}") as on_load:
            try:
                return Decoder(
                    self.model_dir,
                    attention="full",
                    max_seq_len=max_seq_len,
                    max_batch_size=1,
                    progress=on_load,
                    **self.engine,
                )
            except OutOfMemoryError as cause:
                raise OutOfMemoryError(advise_shorter(str(cause))) from None


def advise_shorter(message: str) -> str:
    """The engine's message, with advice that a command with --context can follow."""
    return message.rsplit("; ", 1)[0] + "; give a shorter --context, or free memory"


class Prompt:
    """A prompt that has been read: in the engine, and where a setting asks for it in numpy."""

    def __init__(
        self, decoder: Decoder, prompt_ids: Sequence[int], room: int, reporter: Reporter
    ) -> None:
        self._decoder, self._prompt_ids, self._room = decoder, list(prompt_ids), room
        with reporter.reading("Reading") as on_prefill:
            self._replay = decoder.replay(
                [self._prompt_ids], max_new_tokens=room, on_prefill=on_prefill
            )
        self._quest: QuestReplay | None = None

    def greedy(self, setting: Setting, max_new_tokens: int) -> list[int]:
        """The most likely tokens; none if the logits were unusable."""
        if setting.is_quest:
            ends = self._decoder.folder.eos_token_ids
            return self._paged.greedy(max_new_tokens, eos_token_ids=ends, **setting.options)[0]
        return self._replay.greedy(max_new_tokens, **setting.options)[0]

    def logits(self, setting: Setting, token_ids: Sequence[int]) -> np.ndarray:
        """[len(token_ids), vocab_size] float32, each row predicting the token of its index.

        Raises: TidalError for logits that are not finite.
        """
        replay = self._paged if setting.is_quest else self._replay
        logits = replay.step_logits([token_ids[:-1]], **setting.options)[0]
        if not np.isfinite(logits).all():
            raise unusable_logits(setting.name)
        return logits

    def set_size(self, setting: Setting) -> float:
        """Positions of a set in the last call of this setting, on average; 0 if it was dense."""
        replay = self._paged if setting.is_quest else self._replay
        return round(replay.mean_set_size, 2)

    @property
    def _paged(self) -> QuestReplay:
        if self._quest is None:
            model = _reference_model(self._decoder.folder)
            self._quest = QuestReplay(model, self._prompt_ids, self._room)
        return self._quest

    def __enter__(self) -> Prompt:
        return self

    def __exit__(self, *error: object) -> None:
        self._replay.close()


@lru_cache(maxsize=1)
def _reference_model(folder: ModelFolder) -> ReferenceModel:
    return ReferenceModel(folder)


class Runner:
    """Asks examples in every setting that runs at their context, each answer once.

    The engine is made when something is missing in the results of an earlier run.
    """

    def __init__(
        self, work: Run, room: int, results: ResultFile[Record], reporter: Reporter
    ) -> None:
        """
        Args:
            work: what is decoded.
            room: tokens of the longest prompt and output together.
            results: what an earlier run has left; what is found is added.
            reporter: where progress shows.
        """
        self._work, self._room = work, room
        self._results, self._reporter = results, reporter
        self._keys = Keys(read_model_folder(work.model_dir), work.engine)
        self._decoder: Decoder | None = None

    def has(self, example: Example) -> bool:
        """Whether all records of an example are there."""
        return all(key in self._results.records for _, key in self._wanted(example))

    def open(self) -> Decoder:
        """The engine, made at the first call."""
        if self._decoder is None:
            self._decoder = self._work.decoder(self._room, self._reporter)
        return self._decoder

    def ask(self, example: Example) -> list[Record]:
        """The records of an example, in the order of the settings; decodes what is missing.

        Raises: as Decoder; TidalError if the engine gives up on the prompt.
        """
        wanted, records = self._wanted(example), self._results.records
        new = missing(wanted, records)
        if new:
            found = _decode(self.open(), example, list(new.values()), self._reporter)
            for key, (setting, values) in zip(new, found, strict=True):
                self._results.append(Record(key=key, plan=self._keys.plan(setting), **values))
        # The key says whose a record is, whatever else has been written into the file.
        return [
            replace(
                records[key],
                setting=setting.name,
                task=example.task,
                context=example.context,
                index=example.index,
            )
            for setting, key in wanted
        ]

    def in_order(self, records: Sequence[Record]) -> list[Record]:
        """Records setting by setting, those of each as they are."""
        names = [setting.name for setting in self._work.settings]
        return sorted(records, key=lambda record: names.index(record.setting))

    def _wanted(self, example: Example) -> list[Wanted]:
        return self._keys.wanted(self._work.settings, example.context, _content(example))

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *error: object) -> None:
        if self._decoder is not None:
            self._decoder.close()


def run(
    work: Run, examples: Sequence[Example], results: ResultFile[Record], reporter: Reporter
) -> list[Record]:
    """Decodes what is not in `results` yet.

    Returns: the records of all examples in all settings, setting by setting.
    Raises: as Decoder; TidalError if the engine gives up on a prompt.
    """
    # All examples count, so that a resumed run uses the same engine as one that was not cut off.
    lengths = (len(example.prompt_ids) + example.max_new_tokens for example in examples)
    with Runner(work, max(lengths, default=0), results, reporter) as runner:
        new = [example for example in examples if not runner.has(example)]
        if new:
            runner.open()
            with reporter.counting("Prompts") as on_done:
                on_done(0, len(new))
                for count, example in enumerate(new, start=1):
                    runner.ask(example)
                    on_done(count, len(new))
        found = [record for example in examples for record in runner.ask(example)]
        return runner.in_order(found)


def _content(example: Example) -> list[Any]:
    return [example.task, example.index, example.context, example.digest]


def _decode(
    decoder: Decoder, example: Example, settings: Sequence[Setting], reporter: Reporter
) -> list[tuple[Setting, dict[str, Any]]]:
    """One prompt in these settings: the fields of their records but key and plan."""
    with Prompt(decoder, example.prompt_ids, example.max_new_tokens, reporter) as prompt:
        dense = _decoded(prompt, example, dense_setting())
        expected = prompt.logits(dense_setting(), dense.token_ids)
        results = []
        for setting in settings:
            own = _decoded(prompt, example, setting)
            got = prompt.logits(setting, dense.token_ids)
            kl = round(float(divergences(expected, got).mean()), 6)
            judged = _judged(decoder, example, dense, own)
            results.append((setting, judged | {"kl": kl, "set_size": prompt.set_size(setting)}))
        return results


@dataclass(frozen=True, kw_only=True)
class _Output:
    """What one setting writes."""

    setting: Setting
    token_ids: list[int]
    seconds: float


def _decoded(prompt: Prompt, example: Example, setting: Setting) -> _Output:
    started = time.perf_counter()
    token_ids = prompt.greedy(setting, example.max_new_tokens)
    if not token_ids:
        raise unusable_logits(setting.name)
    return _Output(setting=setting, token_ids=token_ids, seconds=time.perf_counter() - started)


def _judged(decoder: Decoder, example: Example, dense: _Output, own: _Output) -> dict[str, Any]:
    output = decoder.decode(own.token_ids)
    ends = decoder.folder.eos_token_ids
    return {
        "setting": own.setting.name,
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
        "seconds": round(own.seconds, 3),
    }
