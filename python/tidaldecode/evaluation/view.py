"""Prints a report: a row per task, a column per setting, the mean and the worst task below.

Then how near outputs are to the dense ones, what a step reads, and perplexities. Where the columns
do not fit, each setting has a row instead.

Called by command.py. Without colours when piped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tidaldecode.cli.terminal import print_whole, whole_width
from tidaldecode.evaluation.perplexity import Perplexity
from tidaldecode.evaluation.presets import is_preset
from tidaldecode.evaluation.report import Cell, Summary
from tidaldecode.evaluation.sections import (
    COLUMNS,
    NOTHING,
    Section,
    cell_title,
    covers_all,
    find_cell,
    make_sections,
    percent,
    short_names,
    show_kept,
    show_megabytes,
    show_set_size,
)

# Further below dense than this, a score is marked.
_LOSS = 0.01


def show_report(
    console: Console, summaries: Sequence[Summary], perplexities: Sequence[Perplexity]
) -> None:
    """Prints the tables, and which setting each of their columns is."""
    entries: list[Summary | Perplexity] = [*summaries, *perplexities]
    plans = {entry.setting: entry.plan for entry in entries}
    names = dict(zip(plans, short_names(list(plans)), strict=True))
    if summaries:
        _print_tasks(console, names, summaries)
    if perplexities:
        own = list(dict.fromkeys(entry.setting for entry in perplexities))
        shown, titles = [names[setting] for setting in own], ("perplexity", "tokens")
        lines = _perplexity_lines(perplexities, own)
        table = _wide(titles, shown, lines)
        if whole_width(console, table) > console.width:
            table = _narrow(titles, shown, lines)
        print_whole(console, table)
    for setting, plan in plans.items():
        options = "" if is_preset(setting) else setting.partition(" ")[2]
        text = f"{names[setting]}: plan {plan}" + (f", {options}" if options else "")
        console.print(text, markup=False, highlight=False)


@dataclass(frozen=True)
class _Line:
    """A line of a table: one value for each setting."""

    title: str
    count: str  # prompts or tokens
    values: list[Text]
    ends_section: bool = False


def _print_tasks(console: Console, names: dict[str, str], summaries: Sequence[Summary]) -> None:
    """A column for each setting where they fit, else a row; values are whole at any width."""
    shown = [names[summary.setting] for summary in summaries]
    measures = _measure_lines(summaries)
    table = _wide(("score in %", "prompts"), shown, [*_task_lines(summaries), *measures])
    if whole_width(console, table) <= console.width:
        print_whole(console, table)
        return
    print_whole(console, _sections_table(names, make_sections(summaries)))
    table = _transposed(shown, measures)
    if whole_width(console, table) > console.width:
        table = _narrow(("over all prompts", ""), shown, measures)
    print_whole(console, table)


def _sections_table(names: dict[str, str], sections: Sequence[Section]) -> Table:
    table = _new_table("", *COLUMNS)
    for section in sections:
        counts = f"of {section.num_prompts}", f"of {section.found_by_dense}"
        table.add_row(section.title, *counts, "", "")
        scores = _compared([row.score for row in section.rows])
        for row, score in zip(section.rows, scores, strict=True):
            table.add_row(f"  {names[row.setting]}", score, *row.values[1:])
        table.add_section()
    return table


def _wide(titles: tuple[str, str], names: Sequence[str], lines: Sequence[_Line]) -> Table:
    table = _new_table(*titles, *names)
    for line in lines:
        table.add_row(line.title, line.count, *line.values, end_section=line.ends_section)
    return table


def _narrow(titles: tuple[str, str], names: Sequence[str], lines: Sequence[_Line]) -> Table:
    table = _new_table(*titles, "")
    for line in lines:
        table.add_row(line.title, line.count, "")
        for name, value in zip(names, line.values, strict=True):
            if value.plain:
                table.add_row(f"  {name}", "", value)
        if line.ends_section:
            table.add_section()
    return table


def _transposed(names: Sequence[str], lines: Sequence[_Line]) -> Table:
    table = _new_table("", *(line.title.replace(" ", "\n") for line in lines))
    for index, name in enumerate(names):
        table.add_row(name, *(line.values[index] for line in lines))
    return table


def _new_table(title: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(title, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _task_lines(summaries: Sequence[Summary]) -> list[_Line]:
    """Scores, and below each what is kept of the answers that dense finds."""
    lines = []
    dense = summaries[0]
    for cell in dense.cells:
        own = [find_cell(summary, cell) for summary in summaries]
        scores = _compared([None if entry is None else entry.score for entry in own])
        lines.append(_Line(cell_title(cell), str(cell.num_prompts), scores))
        if len(summaries) > 1:
            kept = [NOTHING if entry is None else show_kept(entry.kept) for entry in own]
            lines.append(_kept_line(cell.kept.found_by_dense, kept))
    lines[-1] = replace(lines[-1], ends_section=True)
    whole = [covers_all(summary, dense) for summary in summaries]
    means = [
        summary.mean_score if is_whole else None
        for summary, is_whole in zip(summaries, whole, strict=True)
    ]
    lines.append(_Line("mean", "", _compared(means)))
    if len(summaries) > 1:
        kept = [
            show_kept(summary.kept) if is_whole else NOTHING
            for summary, is_whole in zip(summaries, whole, strict=True)
        ]
        lines.append(_kept_line(dense.kept.found_by_dense, kept))
    return lines + _context_lines(summaries)


def _kept_line(found_by_dense: int, kept: Sequence[str]) -> _Line:
    """The dense column is empty: it keeps all."""
    return _Line("  kept of dense", str(found_by_dense), [Text(""), *map(Text, kept[1:])])


def _context_lines(summaries: Sequence[Summary]) -> list[_Line]:
    """What a step reads at each context; none if nobody counted."""
    lines = []
    for cell in summaries[0].contexts:
        if cell.kv_bytes is not None:
            own = [find_cell(summary, cell) for summary in summaries]
            values = [NOTHING if e is None else show_megabytes(e.kv_bytes) for e in own]
            lines.append(_Line(_bytes_title(cell), "", list(map(Text, values))))
    return lines


def _bytes_title(cell: Cell) -> str:
    at = "" if cell.context is None else f", {cell.context:,} tokens"
    return f"KV MB a step{at}"


def _measure_lines(summaries: Sequence[Summary]) -> list[_Line]:
    """The worst task, and how near outputs are to the dense ones: of settings run everywhere."""
    own = [summary if covers_all(summary, summaries[0]) else None for summary in summaries]
    worst = _compared([None if summary is None else summary.worst.score for summary in own])
    tasks = [Text(summary.worst.task if summary else "", style="dim") for summary in own]
    lines = [_Line("worst task", "", worst), _Line("", "", tasks, ends_section=True)]
    rows = {
        "mean output, tokens": [f"{s.mean_output_tokens:.1f}" if s else NOTHING for s in own],
        "outputs as dense": [percent(s.same_outputs) if s else NOTHING for s in own],
        "tokens as dense": [f"{s.mean_same_tokens:.1f}" if s else NOTHING for s in own],
        "KL to dense, nats": [f"{s.mean_kl:.4f}" if s else NOTHING for s in own],
        "positions of a set": [show_set_size(s.mean_set_size) if s else NOTHING for s in own],
    }
    return lines + [_Line(title, "", list(map(Text, values))) for title, values in rows.items()]


def _perplexity_lines(perplexities: Sequence[Perplexity], settings: Sequence[str]) -> list[_Line]:
    """A value for each of these settings, NOTHING where one was not run."""
    lines = []
    for context in dict.fromkeys(entry.context for entry in perplexities):
        by_setting = {entry.setting: entry for entry in perplexities if entry.context == context}
        own = [by_setting.get(setting) for setting in settings]
        others = [None, *own[1:]]  # the first is dense
        rows = {
            f"{context:,} tokens": [f"{e.perplexity:.3f}" if e else NOTHING for e in own],
            "  over dense, %": [f"{100 * e.over_dense:+.2f}" if e else "" for e in others],
            "  KL to dense, nats": [f"{e.kl:.4f}" if e else "" for e in others],
            "  most likely token as dense, %": [
                f"{100 * e.agreement:.2f}" if e else "" for e in others
            ],
            "  positions of a set": [show_set_size(e.set_size) if e else "" for e in own],
        }
        if any(entry.kv_bytes is not None for entry in by_setting.values()):
            rows["  KV MB a step"] = [show_megabytes(e.kv_bytes) if e else "" for e in own]
        count = str(by_setting[settings[0]].num_tokens)
        for title, values in rows.items():
            lines.append(_Line(title, count, list(map(Text, values))))
            count = ""
    return lines


def _compared(scores: Sequence[float | None]) -> list[Text]:
    """Scores in percent; those below the first are red, where there is none stands NOTHING."""
    dense = scores[0] or 0.0
    return [
        Text(NOTHING)
        if score is None
        else Text(percent(score), style="red" if score < dense - _LOSS else "")
        for score in scores
    ]
