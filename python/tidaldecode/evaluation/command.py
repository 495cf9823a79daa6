"""The command `tidaldecode eval`: dense against tidal settings on the same prompts.

Registered by cli.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tidaldecode import _core
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.cli import options as opt
from tidaldecode.cli.terminal import Bars, is_watched, one_line, print_error, print_note
from tidaldecode.errors import InvalidArgument
from tidaldecode.evaluation.attention import AttentionReport, measure_attention
from tidaldecode.evaluation.example import Encode, Example, make_encoder
from tidaldecode.evaluation.perplexity import (
    SCORED_TOKENS,
    Perplexity,
    Window,
    make_windows,
    read_text,
    run_windows,
    summarise_losses,
)
from tidaldecode.evaluation.plots import draw_report, load_matplotlib
from tidaldecode.evaluation.prompt_file import read_prompt_file
from tidaldecode.evaluation.report import Summary, as_json, summarise
from tidaldecode.evaluation.results import LossRecord, Record, ResultFile
from tidaldecode.evaluation.runner import Run, run
from tidaldecode.evaluation.settings import (
    Setting,
    check_names,
    dense_setting,
    quest_setting,
    tidal_setting,
)
from tidaldecode.evaluation.tasks import TASKS, make_examples
from tidaldecode.evaluation.view import show_report
from tidaldecode.plans import HOW_TO_CHOOSE, find_plan, remember_evaluation
from tidaldecode.sampling import check_integer
from tidaldecode.user_cache import write_whole

_DEFAULT_CONTEXT = 4096
_DEFAULT_PROMPTS = 10  # per task and context: every depth of the single needle once
_OWN_NEW_TOKENS = 64
_DEFAULT_WINDOWS = 8  # of a text, at each context
_LOOKED_AT = 4  # prompts whose attention is measured
_RESULTS_FILE = "results.jsonl"
_LOSSES_FILE = "losses.jsonl"
_REPORT_FILE = "report.json"
EXIT_NOT_WRITTEN = 1


_Tasks = Annotated[
    list[str] | None,
    typer.Option(help=f"Of {', '.join(TASKS)}; may be repeated, all if not given."),
]
_Prompts = Annotated[
    Path | None,
    typer.Option(help="Own prompts instead: lines of JSON with `prompt` and `answers`."),
]
_Text = Annotated[
    Path | None,
    typer.Option(
        help="A text file: perplexity of its tokens as decode steps predict them; alone unless "
        "--task or --prompts is given too."
    ),
]
_Contexts = Annotated[
    list[int] | None,
    typer.Option(
        help="Tokens of prompt and output together; may be repeated. "
        f"[dim]\\[default: {_DEFAULT_CONTEXT}][/dim]"
    ),
]
_Limit = Annotated[
    int | None,
    typer.Option(
        help="Prompts per task and context, windows of a text per context. "
        f"[dim]\\[default: {_DEFAULT_PROMPTS}, of own prompts all, {_DEFAULT_WINDOWS} windows]"
        "[/dim]"
    ),
]
_ScoredTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens at the end of a window that are predicted. "
        f"[dim]\\[default: {SCORED_TOKENS}][/dim]"
    ),
]
_Tidal = Annotated[
    list[str] | None,
    typer.Option(
        help='A setting to compare, as "select_layers=2,9 token_budget=64"; may be repeated; '
        "the model's plan if not given."
    ),
]
_Quest = Annotated[
    list[str] | None,
    typer.Option(
        help='A page-wise setting to compare, as "token_budget=64 page_size=16"; may be repeated. '
        "In numpy, so slow."
    ),
]
_Attention = Annotated[
    bool,
    typer.Option(
        "--attention",
        help="Also measure how much of the dense attention lies on the sets, and how alike layers "
        f"choose, on the {_LOOKED_AT} shortest prompts. In numpy, so slow.",
    ),
]
_Plots = Annotated[
    bool, typer.Option("--plots", help="Draw the report into PNG files; needs matplotlib.")
]
_NewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        "-n",
        help=f"Of own prompts. [dim]\\[default: {_OWN_NEW_TOKENS}][/dim]",
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for results and report; with the same one a run that was cut off goes on. "
        "[dim]\\[default: eval-MODEL][/dim]"
    ),
]


def evaluate(
    model_dir: opt.ModelDir,
    task: _Tasks = None,
    prompts: _Prompts = None,
    text: _Text = None,
    context: _Contexts = None,
    limit: _Limit = None,
    scored_tokens: _ScoredTokens = None,
    tidal: _Tidal = None,
    quest: _Quest = None,
    seed: Annotated[int, typer.Option(help="Of the generated prompts.")] = 0,
    max_new_tokens: _NewTokens = None,
    out: _Out = None,
    chat: opt.Chat = None,
    attention: _Attention = False,
    plots: _Plots = False,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    kv_dtype: opt.KvDType = "auto",
    num_threads: opt.NumThreads = None,
    debug: opt.Debug = False,
) -> None:
    """Compare dense and tidal decoding on long prompts whose answers are known."""
    asked = _Asked(**{name: value for name, value in locals().items() if name in _ASKED})
    asked.check()
    engine = opt.engine_options(
        {"device": device, "dtype": dtype, "kv_dtype": kv_dtype, "num_threads": num_threads}
    )
    settings = _settings(model_dir, tidal, quest)
    work = Run(model_dir=model_dir, settings=settings, engine=engine)
    encode, is_chat = make_encoder(read_model_folder(model_dir), chat)
    bars = Bars(is_watched())
    if plots:
        load_matplotlib()  # better now than after hours of work
    examples = asked.examples(encode, bars)
    windows = asked.windows(make_encoder(read_model_folder(model_dir), False)[0])
    title = model_dir.resolve().name
    folder = out or Path(f"eval-{title}")
    try:
        records = _run_tasks(work, examples, folder, bars)
        perplexities = _run_text(work, windows, folder, bars)
    except KeyboardInterrupt:
        print_note("the same command goes on from here")
        raise
    looked_at = _look(work, examples, bars) if attention else None
    head = {
        "model": title, "engine": _core.version(), **engine, "seed": seed, "limit": limit,
        "chat": is_chat,
    }  # fmt: skip
    found = _Found(records=records, perplexities=perplexities, attention=looked_at)
    console = Console(highlight=False)
    console.print(f"Model: {one_line(str(model_dir))}", soft_wrap=True, markup=False)
    show_report(console, found.summaries, perplexities)
    _remember(model_dir, settings, found.summaries)
    try:
        for line in _write(folder, head, found, plots):
            console.print(line, soft_wrap=True, markup=False)
    except OSError as cause:
        print_error(f"{folder}: {cause.strerror}; what is printed here was not written")
        raise typer.Exit(EXIT_NOT_WRITTEN) from None


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What an evaluation measured."""

    records: list[Record]
    perplexities: list[Perplexity]
    attention: AttentionReport | None

    @property
    def summaries(self) -> list[Summary]:
        """The records summed up, setting by setting."""
        return summarise(self.records)


def _write(folder: Path, head: dict[str, Any], found: _Found, plots: bool) -> Iterator[str]:
    """Writes the report and its plots; a line for each file.

    Raises: OSError.
    """
    content = as_json(head, found.summaries, found.perplexities, found.attention)
    report = folder / _REPORT_FILE
    write_whole(report, json.dumps(content, indent=2, allow_nan=False) + "\n")
    yield f"Report: {one_line(str(report))}"
    if plots:
        for path in draw_report(folder, found.summaries, found.records, found.attention):
            yield f"Plot: {one_line(str(path))}"


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The options that say what is decoded."""

    task: list[str] | None
    prompts: Path | None
    text: Path | None
    context: list[int] | None
    limit: int | None
    scored_tokens: int | None
    seed: int
    max_new_tokens: int | None

    def check(self) -> None:
        """Refuses what does not go together."""
        if self.prompts is not None and self.task:
            raise InvalidArgument("prompts: got a file together with --task, expected one")
        if self.prompts is not None and self.context and self.text is None:
            raise InvalidArgument("prompts: got a file together with --context, expected one")
        if self.prompts is None and self.max_new_tokens is not None:
            raise InvalidArgument("max-new-tokens: got it without --prompts; tasks have their own")
        if self.text is None and self.scored_tokens is not None:
            raise InvalidArgument("scored-tokens: got it without --text, which it belongs to")
        for name in ("limit", "scored_tokens"):
            if (value := getattr(self, name)) is not None:
                check_integer(name, value, low=1)

    def examples(self, encode: Encode, bars: Bars) -> list[Example]:
        """The prompts: own ones, or those of the generated tasks; none for a text alone."""
        if self.prompts is not None:
            new_tokens = _OWN_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
            check_integer("max_new_tokens", new_tokens, low=1)
            return read_prompt_file(
                self.prompts, encode, max_new_tokens=new_tokens, limit=self.limit
            )
        if self.text is not None and not self.task:
            return []
        names, contexts = self.task or list(TASKS), self.context or [_DEFAULT_CONTEXT]
        return _generated(names, encode, contexts, self.limit or _DEFAULT_PROMPTS, self.seed, bars)

    def windows(self, encode: Encode) -> list[Window]:
        """The windows of the text, if there is one."""
        if self.text is None:
            return []
        contexts, count = self.context or [_DEFAULT_CONTEXT], self.limit or _DEFAULT_WINDOWS
        return make_windows(
            read_text(self.text),
            encode,
            contexts,
            count=count,
            scored_tokens=self.scored_tokens or SCORED_TOKENS,
        )


_ASKED = tuple(field.name for field in fields(_Asked))


def _generated(
    names: Sequence[str],
    encode: Encode,
    contexts: Sequence[int],
    per_task: int,
    seed: int,
    bars: Bars,
) -> list[Example]:
    """The examples of generated tasks."""
    examples: list[Example] = []
    with bars.counting("Writing prompts") as on_written:
        for example in make_examples(names, encode, contexts, per_task=per_task, seed=seed):
            examples.append(example)
            on_written(len(examples), len(names) * len(contexts) * per_task)
    return examples


def _run_tasks(work: Run, examples: Sequence[Example], folder: Path, bars: Bars) -> list[Record]:
    """Decodes what an earlier run in the same folder has not."""
    with ResultFile(folder / _RESULTS_FILE, Record) as results:
        return run(work, examples, results, bars)


def _run_text(work: Run, windows: Sequence[Window], folder: Path, bars: Bars) -> list[Perplexity]:
    """Predicts what an earlier run in the same folder has not."""
    if not windows:
        return []
    with ResultFile(folder / _LOSSES_FILE, LossRecord) as results:
        return summarise_losses(run_windows(work, windows, results, bars))


def _look(work: Run, examples: Sequence[Example], bars: Bars) -> AttentionReport:
    """The attention behind a few of the shortest prompts."""
    if not examples:
        raise InvalidArgument("attention: got no prompts to look at; name a --task")
    shortest = sorted(examples, key=lambda example: len(example.prompt_ids))[:_LOOKED_AT]
    settings = [setting for setting in work.settings if not setting.is_quest]
    with bars.counting("Attention") as on_done:
        return measure_attention(read_model_folder(work.model_dir), shortest, settings, on_done)


def _settings(
    model_dir: Path, tidal: Sequence[str] | None, quest: Sequence[str] | None
) -> list[Setting]:
    """Dense first, then what was asked for or the model's plan."""
    paged = [quest_setting(text) for text in quest or []]
    if tidal is None and find_plan(read_model_folder(model_dir)) is None:
        print_note(
            f"no tidal run: there is no plan for this model; {HOW_TO_CHOOSE}, or say with --tidal "
            "what is to be compared"
        )
        return [dense_setting(), *paged]
    settings = [dense_setting(), *(tidal_setting(text) for text in tidal or [""]), *paged]
    check_names(settings)
    return settings


def _remember(model_dir: Path, settings: Sequence[Setting], summaries: Sequence[Summary]) -> None:
    """Notes how the model's own plan did, if it is one that others published."""
    folder = read_model_folder(model_dir)
    own = find_plan(folder)
    if own is None or not own.is_published or not summaries:
        return
    dense = summaries[0]
    for setting in settings:
        plan = None if setting.is_quest else setting.plan(folder)
        found = [summary for summary in summaries if summary.setting == setting.name]
        # An evaluation is sparse at every length, whatever the plan says.
        if plan is None or not found or replace(plan.config, sparse_min_context=None) != own.config:
            continue
        measured = (
            f"{100 * found[0].mean_score:.0f} % of answers where dense has "
            f"{100 * dense.mean_score:.0f} %, KL {found[0].mean_kl:.3f} nats"
        )
        remember_evaluation(folder, own.config, measured)
