"""Prints a calibration: the plans that no other beats, the one that was chosen and how it did.

Called by command.py. Without colours when piped.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from tidaldecode.calibration.run import Job, Outcome
from tidaldecode.calibration.search import frontier
from tidaldecode.cli.terminal import print_whole
from tidaldecode.evaluation.kept import wilson_interval


def show_frontier(console: Console, outcome: Outcome, windows: Sequence[int]) -> None:
    """A row per plan, by ascending bytes; the chosen one is marked."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0))
    table.add_column("plan", no_wrap=True)
    for title in ("budget", "mass", "recent", "sinks", "sets", "KV MB", "share", "loss", "same"):
        table.add_column(title, justify="right", no_wrap=True)
    for point in frontier(outcome.points):
        candidate, scores = point.candidate, point.scores
        options = candidate.options()
        letters = candidate.letters(windows)
        same = f"{100 * scores.agreement:.0f}" if outcome.is_judged_by_questions else "-"
        table.add_row(
            f"{letters} *" if point == outcome.chosen else letters,
            str(candidate.token_budget),
            "-" if candidate.top_p_mass is None else f"{candidate.top_p_mass:g}",
            str(options["recent_tokens"]),
            str(candidate.sink_tokens),
            candidate.granularity,
            f"{point.bytes_per_step / 1e6:,.1f}",
            f"{point.bytes_per_step / outcome.dense_bytes:.2f}",
            f"{scores.loss:.4f}",
            same,
        )
    print_whole(console, table)
    console.print(
        "*: chosen. Layers: F dense, S dense and choosing, P choosing by shadows of its keys, s "
        "sparse, w a window of the model's. Mass: of the attention, what a set holds in at most "
        "the budget. KV MB: of keys and values a step reads; share: of dense; loss: nats a token "
        "over dense, of text and of answers, and one for all answers lost; same: answers as dense, "
        "%",
        highlight=False,
    )


def show_judgement(console: Console, job: Job, outcome: Outcome) -> None:
    """On what plans were judged, and how the chosen one does on questions held out."""
    contexts = " and ".join(f"{context:,}" for context in job.contexts)
    way = "through the chat template" if job.is_chat else "as plain text"
    judged = f"{outcome.num_windows} windows of text"
    if outcome.is_judged_by_questions:
        exam = outcome.exam
        judged = (
            f"{exam.num_counted} questions that the dense model answers rightly and surely "
            f"(of {exam.num_asked} asked, {way}) and {judged}"
        )
    console.print(f"Judged at {contexts} tokens: {judged}", markup=False, highlight=False)
    if outcome.is_judged_by_questions:
        counted = outcome.held_out.num_counted
        low, high = wilson_interval(outcome.num_same, counted) if counted else (0.0, 1.0)
        console.print(
            f"Held-out questions: {outcome.num_same} of {counted} that dense answers rightly are "
            f"answered as dense (95 % interval {100 * low:.0f} to {100 * high:.0f} %)",
            markup=False,
            highlight=False,
        )
