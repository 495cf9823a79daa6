"""Sums up the records of a run: mean and worst task of every setting. What report.json holds.

Called by command.py; view.py prints it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from tidaldecode.evaluation.results import Record

REPORT_VERSION = 1  # of the form of report.json


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One task at one context in one setting."""

    task: str
    context: int | None
    num_prompts: int
    score: float  # mean, 0 to 1
    output_tokens: float  # mean


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One setting over all tasks; every cell counts the same, however many prompts it has."""

    setting: str
    plan: str
    cells: tuple[Cell, ...]
    mean_score: float
    worst: Cell
    mean_output_tokens: float  # over all prompts


def summarise(records: Sequence[Record]) -> list[Summary]:
    """One summary per setting, in the order of the records."""
    by_setting: dict[str, list[Record]] = {}
    for record in records:
        by_setting.setdefault(record.setting, []).append(record)
    return [_summary(setting, own) for setting, own in by_setting.items()]


def _summary(setting: str, records: Sequence[Record]) -> Summary:
    groups: dict[tuple[str, int | None], list[Record]] = {}
    for record in records:
        groups.setdefault((record.task, record.context), []).append(record)
    cells = tuple(
        Cell(
            task=task,
            context=context,
            num_prompts=len(own),
            score=fmean(record.score for record in own),
            output_tokens=fmean(record.output_tokens for record in own),
        )
        for (task, context), own in groups.items()
    )
    return Summary(
        setting=setting,
        plan=records[0].plan,
        cells=cells,
        mean_score=fmean(cell.score for cell in cells),
        worst=min(cells, key=lambda cell: cell.score),
        mean_output_tokens=fmean(record.output_tokens for record in records),
    )


def as_json(model: str, seed: int, summaries: Sequence[Summary]) -> dict[str, Any]:
    """The report as an object of JSON."""
    return {
        "version": REPORT_VERSION,
        "model": model,
        "seed": seed,
        "settings": [asdict(summary) for summary in summaries],
    }
