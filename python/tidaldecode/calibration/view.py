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
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0))
    table.add_column("select", no_wrap=True)
    for title in ("budget", "recent", "sinks", "sets", "KV MB", "share", "loss", "same"):
        table.add_column(title, justify="right", no_wrap=True)
    for point in points:
        candidate, scores = point.candidate, point.scores
        options = candidate.options()
        layers = ",".join(map(str, candidate.select_layers))
        table.add_row(
            f"{layers} *" if point == chosen else layers,
            str(candidate.token_budget),
            str(options["recent_tokens"]),
            str(candidate.sink_tokens),
            candidate.granularity,
            f"{point.bytes_per_step / 1e6:,.1f}",
            f"{point.bytes_per_step / dense_bytes:.2f}",
            f"{scores.loss:.4f}",
            f"{100 * scores.agreement:.0f}",
        )
    console.print(table)
    letters = plan_letters(num_layers, chosen.candidate.select_layers)
    console.print(f"*: chosen, plan {letters}", markup=False, highlight=False)
    console.print(
        "KV MB: of keys and values a step reads; share: of dense; loss: nats a token over dense, "
        "of text and of answers, and one for all answers lost; same: answers as dense, %",
        highlight=False,
    )
