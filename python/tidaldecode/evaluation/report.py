"""Sums up the records of a run: mean and worst task of every setting. What report.json holds.

Called by command.py; view.py prints it, markdown.py writes it for people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from tidaldecode.evaluation.attention import AttentionReport
from tidaldecode.evaluation.costs import StepCosts
from tidaldecode.evaluation.kept import Kept, count_kept
from tidaldecode.evaluation.perplexity import Perplexity
from tidaldecode.evaluation.results import Place, Record

REPORT_VERSION = 5  # of the form of report.json
ALL_TASKS = "all tasks"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One task at one context in one setting, or all tasks together."""

    task: str
    context: int | None
    num_prompts: int
    score: float  # mean, 0 to 1
    output_tokens: float  # mean
    same_tokens: float  # mean tokens of an output until it differs from the dense one
    kl: float  # mean, nats: how far next-token distributions are from the dense ones
    kept: Kept  # of the answers that dense finds
    set_size: float  # mean positions of a set; 0 where all steps are dense
    kv_bytes: int | None  # of keys and values that a step reads, mean; None: not counted


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One setting over all tasks; every cell counts the same, however many prompts it has."""

    setting: str
    plan: str
    cells: tuple[Cell, ...]
    contexts: tuple[Cell, ...]  # all tasks at a context
    mean_score: float
    worst: Cell
    mean_output_tokens: float  # over all prompts, as is what follows
    same_outputs: float  # share that equals the dense output
    mean_same_tokens: float
    mean_kl: float
    mean_set_size: float
    kept: Kept


def summarise(records: Sequence[Record], costs: StepCosts | None = None) -> list[Summary]:
    """One summary per setting, in the order of the records; the first setting is dense.

    Args:
        records: of all settings; dense has those of all prompts.
        costs: counts the bytes of a step, if they are asked for.
    """
    by_setting: dict[str, list[Record]] = {}
    for record in records:
        by_setting.setdefault(record.setting, []).append(record)
    groups = list(by_setting.items())
    dense = {record.place: record for record in groups[0][1]} if groups else {}
    return [_Sums(dense, costs).summary(setting, own) for setting, own in groups]


def _is_same(record: Record, dense: Record) -> bool:
    return record.same_tokens == record.output_tokens == dense.output_tokens


@dataclass(frozen=True)
class _Sums:
    """Sums up records beside the dense ones."""

    dense: Mapping[Place, Record]
    costs: StepCosts | None

    def summary(self, setting: str, records: Sequence[Record]) -> Summary:
        """One setting's records."""
        groups: dict[tuple[str, int | None], list[Record]] = {}
        for record in records:
            groups.setdefault((record.task, record.context), []).append(record)
        cells = tuple(self._cell(*place, own) for place, own in groups.items())
        return Summary(
            setting=setting,
            plan=records[0].plan,
            cells=cells,
            contexts=self._contexts(cells, records),
            mean_score=fmean(cell.score for cell in cells),
            worst=min(cells, key=lambda cell: cell.score),
            mean_output_tokens=fmean(record.output_tokens for record in records),
            same_outputs=fmean(_is_same(record, self.dense[record.place]) for record in records),
            mean_same_tokens=fmean(record.same_tokens for record in records),
            mean_kl=fmean(record.kl for record in records),
            mean_set_size=fmean(record.set_size for record in records),
            kept=count_kept(records, self.dense),
        )

    def _contexts(self, cells: Sequence[Cell], records: Sequence[Record]) -> tuple[Cell, ...]:
        """All tasks at each context; the score is the mean of theirs."""
        found = []
        for context in dict.fromkeys(cell.context for cell in cells):
            own = [record for record in records if record.context == context]
            score = fmean(cell.score for cell in cells if cell.context == context)
            found.append(replace(self._cell(ALL_TASKS, context, own), score=score))
        return tuple(found)

    def _cell(self, task: str, context: int | None, records: Sequence[Record]) -> Cell:
        costs = self.costs
        return Cell(
            task=task,
            context=context,
            num_prompts=len(records),
            score=fmean(record.score for record in records),
            output_tokens=fmean(record.output_tokens for record in records),
            same_tokens=fmean(record.same_tokens for record in records),
            kl=fmean(record.kl for record in records),
            kept=count_kept(records, self.dense),
            set_size=fmean(record.set_size for record in records),
            kv_bytes=round(fmean(map(costs.of, records))) if costs else None,
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
