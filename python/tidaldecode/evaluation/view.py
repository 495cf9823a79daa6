"""Prints a report: a row per task, a column per setting, the mean and the worst task below.

Called by command.py. Without colours when piped.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tidaldecode.evaluation.report import Cell, Summary

# Further below dense than this, a score is marked.
_LOSS = 0.01


def show_report(console: Console, summaries: Sequence[Summary]) -> None:
    """Prints the table, and which setting each of its columns is."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("score in %", no_wrap=True)
    table.add_column("prompts", justify="right")
    names = ["dense", *(f"tidal {number}" for number in range(1, len(summaries)))]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    dense = summaries[0]
    for index, cell in enumerate(dense.cells):
        scores = [summary.cells[index].score for summary in summaries]
        is_last = index + 1 == len(dense.cells)
        table.add_row(_title(cell), str(cell.num_prompts), *_compared(scores), end_section=is_last)
    table.add_row("mean", "", *_compared([summary.mean_score for summary in summaries]))
    table.add_row("worst task", "", *_compared([summary.worst.score for summary in summaries]))
    table.add_row("", "", *(Text(summary.worst.task, style="dim") for summary in summaries))
    table.add_row(
        "mean output, tokens", "", *(f"{summary.mean_output_tokens:.1f}" for summary in summaries)
    )
    console.print(table)
    for name, summary in zip(names, summaries, strict=True):
        setting = summary.setting.partition(" ")[2]
        text = f"{name}: plan {summary.plan}" + (f", {setting}" if setting else "")
        console.print(text, markup=False, highlight=False)


def _title(cell: Cell) -> str:
    return cell.task if cell.context is None else f"{cell.task}, {cell.context:,} tokens"


def _compared(scores: Sequence[float]) -> list[Text]:
    """Scores in percent; those below the first are red."""
    return [
        Text(f"{100 * score:.1f}", style="red" if score < scores[0] - _LOSS else "")
        for score in scores
    ]
