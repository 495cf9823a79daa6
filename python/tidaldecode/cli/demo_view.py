"""What the demo shows: a table side by side, and where in the text the chosen positions lie.

Called by cli/app.py with what demo.py found. Fits 80 columns; without colours when piped.
"""

from __future__ import annotations

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tidaldecode.cli.demo import Comparison, Run, count_in_needle
from tidaldecode.cli.demo_text import HiddenKey
from tidaldecode.plans import HOW_TO_CHOOSE

_COLUMNS = 56
_LEVELS = "·▁▂▃▄▅▆▇█"  # 0, 1, 2, 3-4, 5-8, 9-16, ... positions in a column
_ASCII_LEVELS = ".:-=+*#%@"
_LABEL_WIDTH = 16
_CELL_WIDTH = 15  # of answers and plans in the table, so that it fits 80 columns


def show_comparison(console: Console, comparison: Comparison) -> None:
    """Prints one context: the question, both answers, and the picture."""
    prompt = comparison.prompt
    depth = prompt.needle_start / len(prompt.prompt_ids)
    console.print()
    console.print(
        f"[bold]{len(prompt.prompt_ids):,} tokens[/bold], hidden at {depth:.0%}: "
        f"the magic number for [bold]{prompt.key}[/bold] is {prompt.number}",
        highlight=False,
    )
    console.print(_comparison_table(comparison))
    if comparison.tidal is None:
        console.print(
            f"No tidal run: there is no plan for this model. To make one, {HOW_TO_CHOOSE}."
        )
    elif comparison.tidal.selection:
        _show_picture(console, comparison.tidal, prompt)


def density_line(positions: np.ndarray, seq_len: int, levels: str = _LEVELS) -> str:
    """One character per column of the context, darker where more positions were chosen.

    Args:
        positions: [num_selected] int, each in [0, seq_len).
        seq_len: tokens the line stands for.
        levels: characters for none, 1, 2, 3-4, 5-8, ... positions.
    """
    counts = np.bincount(positions * _COLUMNS // seq_len, minlength=_COLUMNS)[:_COLUMNS]
    steps = np.where(counts > 0, np.ceil(np.log2(np.maximum(counts, 1))) + 1, 0).astype(int)
    return "".join(levels[min(step, len(levels) - 1)] for step in steps)


def marker_line(prompt: HiddenKey, seq_len: int, mark: str) -> str:
    """A line with `mark` over the columns of the hidden sentence."""
    first = prompt.needle_start * _COLUMNS // seq_len
    last = max(first, (prompt.needle_end - 1) * _COLUMNS // seq_len)
    return " " * first + mark * (last - first + 1)


def _comparison_table(comparison: Comparison) -> Table:
    dense, tidal = comparison.dense, comparison.tidal
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("dense",) if tidal is None else ("dense", "tidal", ""):
        table.add_column(name, justify="right", no_wrap=True)

    def row(label: str, left: Text | str, right: Text | str, remark: str = "") -> None:
        cells = [label, left] if tidal is None else [label, left, right, remark]
        table.add_row(*cells)

    other = tidal or dense
    row("plan", _shorten(dense.plan), _shorten(other.plan))
    row("answer", _shown_answer(dense), _shown_answer(other))
    row("is it right?", _verdict(dense), _verdict(other))
    row(
        "KV rows per step and KV head",
        f"{dense.rows_per_step:,}",
        f"{other.rows_per_step:,}",
        f"{dense.rows_per_step / other.rows_per_step:.1f}x fewer",
    )
    ratio = dense.ms_per_token / other.ms_per_token if other.ms_per_token else 0.0
    row(
        "ms per token",
        f"{dense.ms_per_token:.2f}",
        f"{other.ms_per_token:.2f}",
        f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x slower" if ratio else "",
    )
    row("s to the first token", f"{dense.prefill_s:.2f}", f"{other.prefill_s:.2f}")
    return table


def _shown_answer(run: Run) -> Text:
    """The answer, printable and cut to fit; brackets in it are no markup."""
    shown = "".join(c if c.isprintable() else "?" for c in run.answer) or "(nothing)"
    return Text(shown if len(shown) <= _CELL_WIDTH else shown[: _CELL_WIDTH - 1] + "…")


def _verdict(run: Run) -> Text:
    return Text("yes", style="green") if run.is_correct else Text("no", style="red")


def _shorten(plan: str) -> str:
    if len(plan) <= _CELL_WIDTH:
        return plan
    half = _CELL_WIDTH // 2
    return f"{plan[:half]}…{plan[-half:]}"


def _show_picture(console: Console, run: Run, prompt: HiddenKey) -> None:
    is_unicode = (console.encoding or "").lower().startswith("utf")
    levels = _LEVELS if is_unicode else _ASCII_LEVELS
    seq_len = max(
        len(prompt.prompt_ids) + 1,
        1 + max(int(sets.max()) for sets in run.selection.values() if sets.size),
    )
    label = f"{'key is here':<{_LABEL_WIDTH}}"
    mark = marker_line(prompt, seq_len, "▼" if is_unicode else "v")
    num_selected = next(iter(run.selection.values())).shape[1]
    console.print(
        f"Where the {num_selected} positions lie that each layer chose, in the step of the "
        "answer that looked at the key most (right: how many of them are the key's own):",
        highlight=False,
    )
    console.print(Text(label) + Text(mark, style="bold yellow"))
    for layer, sets in run.selection.items():
        for index, padded in enumerate(sets):
            positions = padded[padded >= 0]  # a smaller set of an adaptive budget ends in -1
            name = f"layer {layer} set {index}" if len(sets) > 1 else f"layer {layer}"
            line = density_line(positions, seq_len, levels)
            hits = count_in_needle(positions, prompt)
            console.print(
                Text(f"{name:<{_LABEL_WIDTH}}") + Text(line, style="cyan") + Text(f" {hits:>3}")
            )
    end = f"{seq_len:,}"
    console.print(
        Text(" " * _LABEL_WIDTH + "0" + " " * (_COLUMNS - 1 - len(end)) + end, style="dim")
    )
