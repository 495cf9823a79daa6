"""Prints a report: a row per task, a column per setting, the mean and the worst task below.

Then how near outputs are to the dense ones, and perplexities. Where the columns do not fit, each
setting has a row instead.

Called by command.py. Without colours when piped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tidaldecode.cli.terminal import print_whole, whole_width
from tidaldecode.evaluation.perplexity import Perplexity
from tidaldecode.evaluation.report import Cell, Summary

# Further below dense than this, a score is marked.
_LOSS = 0.01


def show_report(
    console: Console, summaries: Sequence[Summary], perplexities: Sequence[Perplexity]
) -> None:
    """Prints the tables, and which setting each of their columns is."""
    plans = {entry.setting: entry.plan for entry in [*summaries, *perplexities]}
    names = _column_names(list(plans))
    if summaries:
        _print_table(console, ("score in %", "prompts"), names, _task_lines(summaries))
    if perplexities:
        _print_table(console, ("perplexity", "tokens"), names, _perplexity_lines(perplexities))
    for name, (setting, plan) in zip(names, plans.items(), strict=True):
        options = setting.partition(" ")[2]
        text = f"{name}: plan {plan}" + (f", {options}" if options else "")
        console.print(text, markup=False, highlight=False)


def _column_names(settings: Sequence[str]) -> list[str]:
    """Short ones: "dense", "tidal 1", "tidal 2", "quest 1"."""
    names = []
    for setting in settings:
        kind = setting.partition(" ")[0]
        count = sum(name.startswith(f"{kind} ") for name in names) + 1
        names.append(kind if kind == "dense" else f"{kind} {count}")
    return names


@dataclass(frozen=True)
class _Line:
    """A line of a table: one value for each setting."""

    title: str
    count: str  # prompts or tokens
    values: list[Text]
    ends_section: bool = False


def _print_table(
    console: Console, titles: tuple[str, str], names: Sequence[str], lines: Sequence[_Line]
) -> None:
    """A column for each setting where they fit, else a row; values are whole at any width."""
    table = _wide(titles, names, lines)
    if whole_width(console, table) > console.width:
        table = _narrow(titles, names, lines)
    print_whole(console, table)


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


def _new_table(title: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(title, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _task_lines(summaries: Sequence[Summary]) -> list[_Line]:
    lines = []
    dense = summaries[0]
    for index, cell in enumerate(dense.cells):
        scores = [summary.cells[index].score for summary in summaries]
        is_last = index + 1 == len(dense.cells)
        lines.append(_Line(_title(cell), str(cell.num_prompts), _compared(scores), is_last))
    lines.append(_Line("mean", "", _compared([summary.mean_score for summary in summaries])))
    worst = _compared([summary.worst.score for summary in summaries])
    lines.append(_Line("worst task", "", worst))
    tasks = [Text(summary.worst.task, style="dim") for summary in summaries]
    lines.append(_Line("", "", tasks, ends_section=True))
    rows = {
        "mean output, tokens": [f"{summary.mean_output_tokens:.1f}" for summary in summaries],
        "outputs as dense": [f"{100 * summary.same_outputs:.1f}" for summary in summaries],
        "tokens as dense": [f"{summary.mean_same_tokens:.1f}" for summary in summaries],
        "KL to dense, nats": [f"{summary.mean_kl:.4f}" for summary in summaries],
        "positions of a set": [_set_size(summary.mean_set_size) for summary in summaries],
    }
    return lines + [_Line(title, "", list(map(Text, values))) for title, values in rows.items()]


def _perplexity_lines(perplexities: Sequence[Perplexity]) -> list[_Line]:
    lines = []
    for context in dict.fromkeys(entry.context for entry in perplexities):
        own = [entry for entry in perplexities if entry.context == context]
        others = own[1:]
        rows = {
            f"{context:,} tokens": [f"{entry.perplexity:.3f}" for entry in own],
            "  over dense, %": ["", *(f"{100 * entry.over_dense:+.2f}" for entry in others)],
            "  KL to dense, nats": ["", *(f"{entry.kl:.4f}" for entry in others)],
            "  most likely token as dense, %": [
                "",
                *(f"{100 * entry.agreement:.2f}" for entry in others),
            ],
            "  positions of a set": [_set_size(entry.set_size) for entry in own],
        }
        count = str(own[0].num_tokens)
        for title, values in rows.items():
            lines.append(_Line(title, count, list(map(Text, values))))
            count = ""
    return lines


def _set_size(mean: float) -> str:
    return f"{mean:,.0f}" if mean else ""


def _title(cell: Cell) -> str:
    return cell.task if cell.context is None else f"{cell.task}, {cell.context:,} tokens"


def _compared(scores: Sequence[float]) -> list[Text]:
    """Scores in percent; those below the first are red."""
    return [
        Text(f"{100 * score:.1f}", style="red" if score < scores[0] - _LOSS else "")
        for score in scores
    ]
