"""The command `tidaldecode eval`: dense against tidal settings on the same prompts.

Registered by cli/app.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tidaldecode import _core
from tidaldecode.checkpoint.model_folder import ModelFolder, read_model_folder
from tidaldecode.cli import options as opt
from tidaldecode.cli.terminal import Bars, is_watched, one_line, print_error, print_note
from tidaldecode.errors import InvalidArgument
from tidaldecode.evaluation.asked import (
    DEFAULT_CONTEXT,
    DEFAULT_PROMPTS,
    DEFAULT_WINDOWS,
    OWN_NEW_TOKENS,
    Asked,
    lengths_of,
)
from tidaldecode.evaluation.attention import AttentionReport, measure_attention
from tidaldecode.evaluation.costs import StepCosts, cache_dtype
from tidaldecode.evaluation.example import Example, Series, make_encoder
from tidaldecode.evaluation.interval import LEAST_ASKED, MOST_ASKED, run_until_known
from tidaldecode.evaluation.markdown import as_markdown
from tidaldecode.evaluation.perplexity import (
    SCORED_TOKENS,
    Perplexity,
    Window,
    run_windows,
    summarise_losses,
)
from tidaldecode.evaluation.plots import draw_report, load_matplotlib
from tidaldecode.evaluation.presets import (
    DEFAULT_BUDGET,
    PRESETS,
    Comparison,
    Lengths,
    make_presets,
)
from tidaldecode.evaluation.reference import check_in_numpy
from tidaldecode.evaluation.report import Summary, as_json, summarise
from tidaldecode.evaluation.results import LossRecord, Record, ResultFile
from tidaldecode.evaluation.runner import Run, run
from tidaldecode.evaluation.sections import cell_title, find_cell
from tidaldecode.evaluation.settings import (
    Setting,
    check_names,
    dense_setting,
    quest_setting,
    tidal_setting,
)
from tidaldecode.evaluation.tasks import TASKS
from tidaldecode.evaluation.view import show_report
from tidaldecode.plans import HOW_TO_CHOOSE, find_plan, remember_evaluation
from tidaldecode.user_cache import write_whole

_LOOKED_AT = 4  # prompts whose attention is measured
_RESULTS_FILE = "results.jsonl"
_LOSSES_FILE = "losses.jsonl"
_REPORT_FILE = "report.json"
_TABLES_FILE = "report.md"
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
        help="Tokens of prompt and output together; may be repeated."
        + opt.default_words(DEFAULT_CONTEXT)
    ),
]
_Limit = Annotated[
    int | None,
    typer.Option(
        help="Prompts per task and context, windows of a text per context."
        + opt.default_words(f"{DEFAULT_PROMPTS}, of own prompts all, {DEFAULT_WINDOWS} windows")
    ),
]
_Interval = Annotated[
    float | None,
    typer.Option(
        help="Ask until the 95 % interval of the answers kept is at most this wide in every "
        f"setting, such as 0.1: {LEAST_ASKED} prompts per task and context or more, at most "
        "--limit." + opt.default_words(f"off; --limit is then {MOST_ASKED}")
    ),
]
_Compare = Annotated[
    str | None,
    typer.Option(
        help=f"{PRESETS}: known policies beside the model's plan, all at one token budget and all "
        "at its KV bytes a step."
    ),
]
_TokenBudget = Annotated[
    int | None,
    typer.Option(
        help=f"Of --compare {PRESETS}." + opt.default_words(f"the plan's, or {DEFAULT_BUDGET}")
    ),
]
_ScoredTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens at the end of a window that are predicted." + opt.default_words(SCORED_TOKENS)
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
        help="Of own prompts." + opt.default_words(OWN_NEW_TOKENS),
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for results and report; with the same one a run that was cut off goes on."
        + opt.default_words("eval-MODEL")
    ),
]


@opt.with_options(engine=opt.engine_options(*opt.PLACE, "num_threads"))
def evaluate(
    model_dir: opt.ModelDir,
    *,
    task: _Tasks = None,
    prompts: _Prompts = None,
    text: _Text = None,
    context: _Contexts = None,
    limit: _Limit = None,
    interval: _Interval = None,
    scored_tokens: _ScoredTokens = None,
    compare: _Compare = None,
    token_budget: _TokenBudget = None,
    tidal: _Tidal = None,
    quest: _Quest = None,
    seed: Annotated[int, typer.Option(help="Of the generated prompts.")] = 0,
    max_new_tokens: _NewTokens = None,
    out: _Out = None,
    chat: opt.Chat = None,
    attention: _Attention = False,
    plots: _Plots = False,
    engine: dict[str, Any],
    debug: opt.Debug = False,
) -> None:
    """Compare dense and tidal decoding on long prompts whose answers are known."""
    given = locals()
    asked = Asked(**{name: value for name, value in given.items() if name in _ASKED})
    asked.check()
    model = read_model_folder(model_dir)
    settings = _settings(model, tidal, quest, asked)
    encode, is_chat = make_encoder(model, chat)
    if plots:
        load_matplotlib()  # better now than after hours of work
    bars, series = Bars(is_watched()), asked.series(encode)
    _check_prompts(series, attention=attention, plots=plots)
    if attention or quest:
        check_in_numpy(model)
    windows = asked.windows(make_encoder(model, False)[0])
    comparison = _comparison(model, asked, lengths_of(series, windows), engine)
    settings += comparison.settings if comparison else []
    work = Run(model_dir=model_dir, settings=settings, engine=engine)
    folder = out or Path(f"eval-{model_dir.resolve().name}")
    with _resumable():
        examples, records = _run_tasks(work, series, asked, folder, bars)
        losses = _run_text(work, windows, folder, bars)
    costs = StepCosts(model, settings, cache_dtype(model, engine))
    head = {
        "model": model_dir.resolve().name, "engine": _core.version(), **engine, "seed": seed,
        "limit": limit, "interval": interval, "asked": len(examples), "chat": is_chat,
        "compare": comparison and comparison.as_json(),
    }  # fmt: skip
    found = _Found(
        head=head, summaries=summarise(records, costs), records=records,
        perplexities=summarise_losses(losses, costs),
        attention=_look(work, examples, bars) if attention else None,
    )  # fmt: skip
    try:
        _show(model_dir, found)
    finally:  # also where stdout takes nothing
        _remember(model_dir, settings, found.summaries)
        _keep(folder, found, plots)


def _check_prompts(series: Sequence[Any], **options: bool) -> None:
    """Refuses options that look at prompts where there are none."""
    for option, is_given in options.items():
        if is_given and not series:
            raise InvalidArgument(f"{option}: got no prompts to look at; name a --task")


@contextmanager
def _resumable() -> Iterator[None]:
    """Work whose results are in files as soon as they are there."""
    try:
        yield
    except KeyboardInterrupt:
        print_note("the same command goes on from here")
        raise


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What an evaluation measured."""

    head: dict[str, Any]  # what it belongs to, as report.json has it
    summaries: list[Summary]
    records: list[Record]
    perplexities: list[Perplexity]
    attention: AttentionReport | None


def _keep(folder: Path, found: _Found, plots: bool) -> None:
    """Writes the report, or says that it is lost."""
    console = Console(highlight=False, markup=False)
    try:
        lines = [*_write(folder, found, plots)]
    except OSError as cause:
        print_error(f"{folder}: {cause.strerror}; what is printed here was not written")
        raise typer.Exit(EXIT_NOT_WRITTEN) from None
    for line in lines:
        console.print(line, soft_wrap=True)


def _comparison(
    model: ModelFolder, asked: Asked, lengths: Lengths, engine: dict[str, Any]
) -> Comparison | None:
    """The presets, if they are asked for, and notes on them before hours of work."""
    if asked.compare is None:
        return None
    kv_dtype = cache_dtype(model, engine)
    comparison = make_presets(model, lengths, asked.token_budget, kv_dtype)
    for note in comparison.notes:
        print_note(note)
    return comparison


def _show(model_dir: Path, found: _Found) -> None:
    """Prints the report."""
    console = Console(highlight=False, markup=False)
    console.print(f"Model: {one_line(str(model_dir))}", soft_wrap=True)
    show_report(console, found.summaries, found.perplexities)
    width = found.head["interval"]
    if width is not None and found.summaries:
        console.print(_asked_line(width, found.summaries), soft_wrap=True)


def _asked_line(width: float, summaries: Sequence[Summary]) -> str:
    """How many prompts were asked, and where that was not enough."""
    dense, *others = summaries
    wide = [
        f"{cell_title(cell)} ({cell.num_prompts})"
        for cell in dense.cells
        if any(own.kept.width > width for s in others if (own := find_cell(s, cell)) is not None)
    ]
    num_asked = sum(cell.num_prompts for cell in dense.cells)
    line = f"Asked {num_asked:,} prompts for intervals of at most {100 * width:g} points"
    return line + (f"; still wider: {', '.join(wide)}" if wide else "")


def _write(folder: Path, found: _Found, plots: bool) -> Iterator[str]:
    """Writes the report and its plots; a line for each.

    Raises: OSError.
    """
    content = as_json(found.head, found.summaries, found.perplexities, found.attention)
    report = folder / _REPORT_FILE
    write_whole(report, json.dumps(content, indent=2, allow_nan=False) + "\n")
    tables = as_markdown(found.head["model"], found.summaries, found.perplexities)
    write_whole(folder / _TABLES_FILE, tables)
    yield f"Report: {one_line(str(report))}, {_TABLES_FILE}"
    if plots:
        for path in draw_report(folder, found.summaries, found.records, found.attention):
            yield f"Plot: {one_line(str(path))}"


_ASKED = tuple(field.name for field in fields(Asked))


def _write_prompts(series: Sequence[Series], bars: Bars) -> list[Example]:
    """All examples of the series."""
    examples: list[Example] = []
    total = sum(entry.most for entry in series)
    with bars.counting("Writing prompts") as on_written:
        for entry in series:
            for index in range(entry.most):
                examples.append(entry.make(index))
                on_written(len(examples), total)
    return examples


def _run_tasks(
    work: Run, series: Sequence[Series], asked: Asked, folder: Path, bars: Bars
) -> tuple[list[Example], list[Record]]:
    """Decodes what an earlier run in the same folder has not: (examples, their records)."""
    if asked.interval is None or not series:
        examples = _write_prompts(series, bars)
        with ResultFile(folder / _RESULTS_FILE, Record) as results:
            return examples, run(work, examples, results, bars)
    for entry in series:
        entry.make(0)  # a context that is too short is refused before any work
    with ResultFile(folder / _RESULTS_FILE, Record) as results:
        return run_until_known(work, series, asked.interval, results, bars)


def _run_text(work: Run, windows: Sequence[Window], folder: Path, bars: Bars) -> list[LossRecord]:
    """Predicts what an earlier run in the same folder has not."""
    if not windows:
        return []
    with ResultFile(folder / _LOSSES_FILE, LossRecord) as results:
        return run_windows(work, windows, results, bars)


def _look(work: Run, examples: Sequence[Example], bars: Bars) -> AttentionReport:
    """The attention behind a few of the shortest prompts, all of one context."""
    shortest = sorted(examples, key=lambda example: len(example.prompt_ids))[:_LOOKED_AT]
    context = shortest[0].context
    shortest = [example for example in shortest if example.context == context]
    settings = [
        setting for setting in work.settings if not setting.is_quest and setting.runs_at(context)
    ]
    with bars.counting("Attention") as on_done:
        return measure_attention(read_model_folder(work.model_dir), shortest, settings, on_done)


def _settings(
    folder: ModelFolder, tidal: Sequence[str] | None, quest: Sequence[str] | None, asked: Asked
) -> list[Setting]:
    """Dense first, then what was asked for, else the model's plan or the safe one; then presets."""
    paged = [quest_setting(text) for text in quest or []]
    if tidal is None and asked.compare is None:
        tidal = [""]
        if find_plan(folder) is None:
            print_note(
                "there is no plan for this model, so every layer chooses for itself; "
                f"{HOW_TO_CHOOSE}, or say with --tidal what is to be compared"
            )
    settings = [dense_setting(), *(tidal_setting(text) for text in tidal or []), *paged]
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
