"""Decodes the examples in every setting, greedily, one engine after the other.

Called by command.py. Results go to the file as they come; those that are there already are not
made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tidaldecode import _core
from tidaldecode.batch import PrefillProgress
from tidaldecode.decoder import Decoder
from tidaldecode.errors import TidalError, WeightsError
from tidaldecode.evaluation.example import Example
from tidaldecode.evaluation.results import Record, ResultFile
from tidaldecode.evaluation.scoring import score
from tidaldecode.evaluation.settings import Setting
from tidaldecode.json_file import open_regular_file, read_exactly
from tidaldecode.model_folder import ModelFolder, read_model_folder
from tidaldecode.plans import Plan, find_plan

# More than a tokenizer.json has, and enough of the weights to tell two trainings apart.
_FINGERPRINT_BYTES = 16 * 1024 * 1024


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
    examples: Sequence[Example]
    engine: dict[str, Any]  # options of Decoder for all settings: device, dtype, num_threads


def run(work: Run, results: ResultFile, reporter: Reporter) -> list[Record]:
    """Decodes what is not in `results` yet.

    Returns: the records of all examples in all settings, setting by setting.
    Raises: as Decoder; TidalError if the engine gives up on a prompt.
    """
    folder = read_model_folder(work.model_dir)
    fingerprint, plan = model_fingerprint(folder), find_plan(folder)
    records: list[Record] = []
    for setting in work.settings:
        keys = [_key(work, setting, fingerprint, plan, example) for example in work.examples]
        missing = [
            (key, example)
            for key, example in zip(keys, work.examples, strict=True)
            if key not in results.records
        ]
        if missing:
            _run_setting(work, setting, missing, results, reporter)
        records += [results.records[key] for key in keys]
    return records


def model_fingerprint(folder: ModelFolder) -> str:
    """Changes with the model's files; of weights their sizes and beginnings count."""
    digest = hashlib.sha256()
    for path in sorted(folder.path.iterdir()):
        if path.suffix == ".safetensors" or path.name in ("config.json", "tokenizer.json"):
            descriptor, size = open_regular_file(path, WeightsError)
            try:
                beginning = read_exactly(descriptor, 0, _FINGERPRINT_BYTES)
            finally:
                os.close(descriptor)
            digest.update(f"{path.name} {size}\n".encode())
            digest.update(hashlib.sha256(beginning).digest())
    return digest.hexdigest()[:16]


def _key(work: Run, setting: Setting, fingerprint: str, plan: Plan | None, example: Example) -> str:
    """Of what decides an output: model, version, options, prompt."""
    # Settings of the plan hold wherever an option does not say otherwise.
    is_tidal = setting.options["attention"] == "tidal"
    content = [
        fingerprint,
        _core.version(),
        {**work.engine, **setting.options},
        [plan.select_layers, dict(plan.settings)] if plan and is_tidal else None,
        [example.task, example.index, example.context, example.digest],
    ]
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _run_setting(
    work: Run,
    setting: Setting,
    missing: Sequence[tuple[str, Example]],
    results: ResultFile,
    reporter: Reporter,
) -> None:
    """Decodes these examples with an engine of their own."""
    # Of all examples, so that a resumed run uses the same engine as one that was not cut off.
    room = max(len(example.prompt_ids) + example.max_new_tokens for example in work.examples)
    with (
        reporter.loading(f"Loading {work.model_dir.name}, {setting.name}") as on_load,
        Decoder(
            work.model_dir,
            **work.engine,
            **setting.options,
            max_seq_len=room,
            max_batch_size=1,
            progress=on_load,
        ) as decoder,
        reporter.counting(setting.name) as on_done,
    ):
        on_done(0, len(missing))
        for count, (key, example) in enumerate(missing, start=1):
            results.append(_decode(decoder, setting, key, example))
            on_done(count, len(missing))


def _decode(decoder: Decoder, setting: Setting, key: str, example: Example) -> Record:
    started = time.perf_counter()
    # Explicit, because the folder's generation_config.json may ask for sampling.
    result = decoder.generate(
        list(example.prompt_ids),
        max_new_tokens=example.max_new_tokens,
        temperature=0.0,
        repetition_penalty=1.0,
    )
    if result.error is not None:
        raise TidalError(f"{example.task} {example.index}, {setting.name}: {result.error}")
    output = result.text or ""
    return Record(
        key=key,
        setting=setting.name,
        plan=decoder.plan,
        task=example.task,
        index=example.index,
        context=example.context,
        depth=example.depth,
        score=score(example.rule, output, example.answers),
        output=output,
        answers=example.answers,
        prompt_tokens=len(example.prompt_ids),
        output_tokens=len(result.token_ids),
        finish_reason=result.finish_reason,
        seconds=round(time.perf_counter() - started, 3),
    )
