"""Prints a report: a row per task, a column per setting, the mean and the worst task below.

Then how near outputs are to the dense ones, and perplexities.

Called by command.py. Without colours when piped.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

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
        console.print(_task_table(names, summaries))
    if perplexities:
        console.print(_perplexity_table(names, perplexities))
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


def _new_table(title: str, count_title: str, names: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(title, no_wrap=True)
    table.add_column(count_title, justify="right")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _task_table(names: Sequence[str], summaries: Sequence[Summary]) -> Table:
    table = _new_table("score in %", "prompts", names)
    dense = summaries[0]
    for index, cell in enumerate(dense.cells):
        scores = [summary.cells[index].score for summary in summaries]
        is_last = index + 1 == len(dense.cells)
        table.add_row(_title(cell), str(cell.num_prompts), *_compared(scores), end_section=is_last)
    table.add_row("mean", "", *_compared([summary.mean_score for summary in summaries]))
    table.add_row("worst task", "", *_compared([summary.worst.score for summary in summaries]))
    table.add_row(
        "", "", *(Text(summary.worst.task, style="dim") for summary in summaries), end_section=True
    )
    rows = {
        "mean output, tokens": [f"{summary.mean_output_tokens:.1f}" for summary in summaries],
        "outputs as dense": [f"{100 * summary.same_outputs:.1f}" for summary in summaries],
        "tokens as dense": [f"{summary.mean_same_tokens:.1f}" for summary in summaries],
        "KL to dense, nats": [f"{summary.mean_kl:.4f}" for summary in summaries],
        "positions of a set": [_set_size(summary.mean_set_size) for summary in summaries],
    }
    for title, values in rows.items():
        table.add_row(title, "", *values)
    return table


def _perplexity_table(names: Sequence[str], perplexities: Sequence[Perplexity]) -> Table:
    table = _new_table("perplexity", "tokens", names)
    contexts = list(dict.fromkeys(entry.context for entry in perplexities))
    for context in contexts:
        own = [entry for entry in perplexities if entry.context == context]
        values = [f"{entry.perplexity:.3f}" for entry in own]
        table.add_row(f"{context:,} tokens", str(own[0].num_tokens), *values)
        over = ["", *(f"{100 * entry.over_dense:+.2f}" for entry in own[1:])]
        table.add_row("  over dense, %", "", *over)
        table.add_row("  KL to dense, nats", "", "", *(f"{entry.kl:.4f}" for entry in own[1:]))
        same = ["", *(f"{100 * entry.agreement:.2f}" for entry in own[1:])]
        table.add_row("  most likely token as dense, %", "", *same)
        table.add_row("  positions of a set", "", *(_set_size(entry.set_size) for entry in own))
    return table


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
