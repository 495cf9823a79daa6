"""Prints a calibration: the plans that no other beats, and the one that was chosen.

Called by command.py. Without colours when piped.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from tidaldecode.calibration.search import Point
from tidaldecode.plans import plan_letters


def show_frontier(
    console: Console, points: Sequence[Point], chosen: Point, num_layers: int, dense_bytes: int
) -> None:
    """A row per plan, by ascending bytes; the chosen one is marked."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("plan", no_wrap=True)
    for title in ("budget", "recent", "sinks", "sets", "KV MB", "of dense", "loss", "same"):
        table.add_column(title, justify="right", no_wrap=True)
    for point in points:
        candidate, scores = point.candidate, point.scores
        options = candidate.options()
        mark = " *" if point == chosen else ""
        table.add_row(
            plan_letters(num_layers, candidate.select_layers) + mark,
            str(candidate.token_budget),
            str(options["recent_tokens"]),
            str(candidate.sink_tokens),
            candidate.granularity,
            f"{point.bytes_per_step / 1e6:,.1f}",
            f"{point.bytes_per_step / dense_bytes:.2f}",
            f"{scores.loss:.4f}",
            f"{100 * scores.agreement:.0f} %",
        )
    console.print(table)
    console.print(
        "KV MB: of keys and values a step reads; loss: nats a token over dense, of text and of "
        "answers, and one for all answers lost; same: answers as dense; *: chosen",
        highlight=False,
    )
