"""Sums up the records of a run: mean and worst task of every setting. What report.json holds.

Called by command.py; view.py prints it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from tidaldecode.evaluation.attention import AttentionReport
from tidaldecode.evaluation.perplexity import Perplexity
from tidaldecode.evaluation.results import Record

REPORT_VERSION = 4  # of the form of report.json


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One task at one context in one setting."""

    task: str
    context: int | None
    num_prompts: int
    score: float  # mean, 0 to 1
    output_tokens: float  # mean
    same_tokens: float  # mean tokens of an output until it differs from the dense one
    kl: float  # mean, nats: how far next-token distributions are from the dense ones


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One setting over all tasks; every cell counts the same, however many prompts it has."""

    setting: str
    plan: str
    cells: tuple[Cell, ...]
    mean_score: float
    worst: Cell
    mean_output_tokens: float  # over all prompts, as is what follows
    same_outputs: float  # share that equals the dense output
    mean_same_tokens: float
    mean_kl: float
    mean_set_size: float


def summarise(records: Sequence[Record]) -> list[Summary]:
    """One summary per setting, in the order of the records; the first setting is dense."""
    by_setting: dict[str, list[Record]] = {}
    for record in records:
        by_setting.setdefault(record.setting, []).append(record)
    groups = list(by_setting.items())
    dense = {record.place: record for record in groups[0][1]} if groups else {}
    return [_summary(setting, own, dense) for setting, own in groups]


def _is_same(record: Record, dense: Record) -> bool:
    return record.same_tokens == record.output_tokens == dense.output_tokens


def _summary(setting: str, records: Sequence[Record], dense: Mapping[Hashable, Record]) -> Summary:
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
            same_tokens=fmean(record.same_tokens for record in own),
            kl=fmean(record.kl for record in own),
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
        same_outputs=fmean(_is_same(record, dense[record.place]) for record in records),
        mean_same_tokens=fmean(record.same_tokens for record in records),
        mean_kl=fmean(record.kl for record in records),
        mean_set_size=fmean(record.set_size for record in records),
    )


def as_json(
    head: dict[str, Any],
    summaries: Sequence[Summary],
    perplexities: Sequence[Perplexity],
    attention: AttentionReport | None,
) -> dict[str, Any]:
    """The report as an object of JSON.

    Args:
        head: what it belongs to: model, seed, device, command.
        summaries: of the tasks.
        perplexities: of the text.
        attention: of the chosen sets, if it was looked at.
    """
    return {
        "version": REPORT_VERSION,
        **head,
        "settings": [asdict(summary) for summary in summaries],
        "perplexity": [asdict(entry) for entry in perplexities],
        "attention": asdict(attention) if attention else None,
    }
