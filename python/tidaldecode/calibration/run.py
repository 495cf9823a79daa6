"""One calibration from the model's folder to the plan that was chosen and how it did.

Called by command.py, which takes the options and prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidaldecode import _core
from tidaldecode.calibration.data import HELD_OUT_WORDS, MOST_QUESTIONS, QuestionSource
from tidaldecode.calibration.objective import Objective, Scores, question_groups, text_groups
from tidaldecode.calibration.open_prompts import OpenPrompts, Reporter
from tidaldecode.calibration.questions import LEAST_COUNTED, Exam, Examiner
from tidaldecode.calibration.score_file import ScoreFile
from tidaldecode.calibration.search import Candidate, Point, Search, Stage, choose
from tidaldecode.checkpoint.fingerprint import model_fingerprint
from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.cli.terminal import print_note
from tidaldecode.decoder import Decoder
from tidaldecode.engine_config import resolve_device
from tidaldecode.errors import OutOfMemoryError
from tidaldecode.evaluation.example import Encode
from tidaldecode.evaluation.perplexity import Window, make_windows
from tidaldecode.evaluation.runner import advise_shorter
from tidaldecode.plan_bytes import row_bytes
from tidaldecode.user_cache import user_cache_dir

# Windows of each context. What is predicted lies within the last tokens of a window: so many, or
# that share of a short one.
_NUM_WINDOWS = 2
_TEXT_SPREAD = 768
_TEXT_SHARE = 0.25
# Documents that are as a rule enough for the questions of the search.
_DOCUMENTS = 12
_TAIL_TOKENS = 128  # room for what is asked about a document, and the answer
# The share of the free memory that prompts may take while plans are compared.
_CACHE_SHARE = 0.5
# On a CPU, where other programs live too, no more than this, or so many times the weights of a
# model that is large already, as long as one group has room.
_CPU_CACHE_BYTES = 7 * 1024**3 // 4
_CPU_CACHE_WEIGHTS = 3
_SEED_STEP = 1_000_003  # between the questions of the search and those held out


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of a calibration."""

    folder: ModelFolder
    text: str
    encode: Encode  # of plain text
    ask: Encode  # of a question: through the chat template, or as `encode`
    is_chat: bool
    contexts: tuple[int, ...]  # ascending
    budgets: tuple[int, ...]
    max_choosing_layers: int | None
    max_loss: float
    seed: int
    engine: dict[str, Any]  # options of Decoder: device, dtype, kv_dtype, weight_format, …

    @property
    def page_size(self) -> int:
        """Tokens of a page of the cache."""
        return _core.DecodeConfig().page_size

    def questions(self, *, held_out: bool) -> QuestionSource:
        """Where its questions come from: those of the search, or those held out."""
        options = {"words": HELD_OUT_WORDS} if held_out else {}
        return QuestionSource(
            text=self.text,
            encode=self.ask,
            contexts=self.contexts,
            seed=self.seed + _SEED_STEP * held_out,
            **options,
        )

    def windows(self) -> list[Window]:
        """Windows of the text at every context."""
        return [
            window
            for context in self.contexts
            for window in make_windows(
                self.text,
                self.encode,
                [context],
                count=_NUM_WINDOWS,
                scored_tokens=max(1, min(_TEXT_SPREAD, round(_TEXT_SHARE * context))),
            )
        ]

    def decoder_options(self) -> dict[str, Any]:
        """Options of Decoder, with a cache for as many prompts as sensible."""
        options = dict(self.engine)
        device = resolve_device(options.get("device", "auto"))
        if device == "cpu" and options.get("kv_dtype", "auto") == "auto":
            options["kv_dtype"] = "bfloat16"  # half the memory; dense is measured in it too
        pages = [-(-context // self.page_size) for context in self.contexts]
        document = max(pages) + MOST_QUESTIONS * (1 + _TAIL_TOKENS // self.page_size)
        # All documents may be of the longest context, where the model answers at no other.
        wanted = sum(pages) * _NUM_WINDOWS + document * _DOCUMENTS
        return {
            **options,
            "attention": "full",
            "max_seq_len": max(self.contexts),
            "max_batch_size": MOST_QUESTIONS,
            "num_pages": max(document, min(wanted, self._room(device, options))),
            "page_size": self.page_size,
        }

    def _room(self, device: str, options: dict[str, Any]) -> int:
        """Pages that the machine has room for."""
        model = self.folder.model
        kv_dtype = options.get("kv_dtype", "auto")
        row = row_bytes(model, "bfloat16" if kv_dtype == "auto" else kv_dtype)
        names = (device, f"{device}:0")  # "cuda" is the first of them
        found = [d["free_bytes"] for d in _core.list_devices() if d["name"] in names]
        room = max(0, sum(found) - 2 * self.folder.decoded_bytes) * _CACHE_SHARE
        if device == "cpu":
            most = max(_CPU_CACHE_BYTES, _CPU_CACHE_WEIGHTS * self.folder.decoded_bytes)
            room = min(room, most)
        return int(room) // (model.num_layers * self.page_size * row)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a calibration found."""

    points: Sequence[Point]
    chosen: Point
    exam: Exam  # of the search
    held_out: Exam
    num_same: int  # of the held-out questions that count, answered as dense by the chosen plan
    dense_bytes: int  # of keys and values of a dense step
    num_windows: int

    @property
    def is_judged_by_questions(self) -> bool:
        """Whether answers count; else the text alone does."""
        return self.exam.is_enough


def calibrate_model(job: Job, reporter: Any) -> Outcome:
    """Searches, chooses, and measures the choice on questions held out.

    Args:
        job: what is asked.
        reporter: a Reporter that also shows loading (cli.terminal.Bars).

    Raises: as Decoder; InvalidArgument for a text or context that is too short; UnsupportedError.
    """
    windows = job.windows()
    sources = {held_out: job.questions(held_out=held_out) for held_out in (False, True)}
    digest = f"{sources[False].digest()}-{int(job.is_chat)}"
    with reporter.loading(f"Loading {job.folder.path.name}") as on_load:
        decoder = _open(job, on_load)
    with decoder:
        scores, prompts = ScoreFile(_score_path(decoder, digest)), OpenPrompts(decoder, reporter)
        examiner = Examiner(prompts, scores)
        exam = examiner.ask(sources[False], "questions")
        groups = text_groups(windows)
        if exam.is_enough:
            groups = [*question_groups(exam.answered), *groups]
        else:
            print_note(
                f"this model cannot judge by questions: of {exam.num_asked} asked, "
                f"{exam.num_counted} were answered rightly and surely, {LEAST_COUNTED} are "
                "needed; plans are judged on the text alone, which says little of answers"
            )
        objective = Objective(prompts, groups, scores)
        kv_dtype = decoder.config.kv_dtype
        search = Search(
            job.folder.model,
            lambda candidates, is_quick, stage: _measure(
                objective, candidates, is_quick, stage, reporter
            ),
            seq_len=max(job.contexts),
            kv_dtype=kv_dtype,
        )
        points = search.run(job.budgets, job.max_choosing_layers, max_loss=job.max_loss)
        chosen = choose(points, job.max_loss)
        held_out = Exam(answered=(), num_asked=0)
        num_same = 0
        if exam.is_enough:
            held_out = examiner.ask(sources[True], "questions held out", is_sure=False)
            others = Objective(prompts, question_groups(held_out.answered), scores)
            num_same = others.num_same(chosen.candidate.options())
        prompts.close()
        return Outcome(
            points=points,
            chosen=chosen,
            exam=exam,
            held_out=held_out,
            num_same=num_same,
            dense_bytes=search.dense_bytes(),
            num_windows=len(windows),
        )


def _open(job: Job, on_load: Any) -> Decoder:
    try:
        return Decoder(job.folder.path, **job.decoder_options(), progress=on_load)
    except OutOfMemoryError as cause:
        raise OutOfMemoryError(advise_shorter(str(cause))) from None


def _measure(
    objective: Objective,
    candidates: Sequence[Candidate],
    is_quick: bool,
    stage: Stage,
    reporter: Reporter,
) -> list[Scores]:
    """Losses of plans, with a bar for the stage."""
    count = len(candidates)
    work = "ranking" if is_quick else "measuring"
    total = count * objective.num_groups(is_quick=is_quick)
    title = f"{stage}: {work} {count} {'plan' if count == 1 else 'plans'}"
    with reporter.counting(title) as on_done:
        on_done(0, total)
        return objective.measure(
            [candidate.options() for candidate in candidates],
            lambda done: on_done(done, total),
            is_quick=is_quick,
        )


def _score_path(decoder: Decoder, digest: str) -> Path:
    """Where scores of this model, engine and data are kept."""
    config = decoder.config
    name = [_core.version(), config.device.partition(":")[0], config.dtype, config.kv_dtype]
    if config.weight_format != "auto":
        name.append(config.weight_format)
    if config.lm_head_format != "auto":
        name.append(f"lm_head-{config.lm_head_format}")
    if config.activation_format != "16bit":
        name.append(f"activations-{config.activation_format}")
    fingerprint = model_fingerprint(decoder.folder)
    return user_cache_dir() / "scores" / f"{fingerprint}-{digest}-{'-'.join(name)}.jsonl"
