"""A report as sections: a task at a context or all of them, and in each a row for every setting.

Used by view.py and markdown.py. What a setting was not run at has no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tidaldecode.evaluation.kept import Kept
from tidaldecode.evaluation.presets import is_preset
from tidaldecode.evaluation.report import Cell, Summary

NOTHING = "-"
COLUMNS = ("score\nin %", "kept of\ndense, %", "KV MB\na step", "set")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A setting's values, ready to be shown."""

    setting: str
    values: tuple[str, ...]  # as COLUMNS
    score: float


@dataclass(frozen=True, kw_only=True)
class Section:
    """Prompts that belong together."""

    title: str
    num_prompts: int
    found_by_dense: int
    rows: tuple[Row, ...]


def make_sections(summaries: Sequence[Summary]) -> list[Section]:
    """Every task at every context, all tasks at each context, everything."""
    dense = summaries[0]
    sections = [_section(cell, summaries) for cell in dense.cells]
    if len(dense.cells) > len(dense.contexts):
        sections += [_section(cell, summaries) for cell in dense.contexts]
    if len(dense.contexts) > 1:
        rows = tuple(
            Row(
                setting=summary.setting,
                values=(percent(summary.mean_score), show_kept(summary.kept), "", ""),
                score=summary.mean_score,
            )
            for summary in summaries
            if covers_all(summary, dense)
        )
        sections.append(
            Section(
                title="everything",
                num_prompts=sum(cell.num_prompts for cell in dense.cells),
                found_by_dense=dense.kept.found_by_dense,
                rows=rows,
            )
        )
    return sections


def _section(dense_cell: Cell, summaries: Sequence[Summary]) -> Section:
    rows = []
    for summary in summaries:
        cell = find_cell(summary, dense_cell)
        if cell is not None:
            values = (
                percent(cell.score),
                show_kept(cell.kept),
                show_megabytes(cell.kv_bytes),
                show_set_size(cell.set_size),
            )
            rows.append(Row(setting=summary.setting, values=values, score=cell.score))
    return Section(
        title=cell_title(dense_cell),
        num_prompts=dense_cell.num_prompts,
        found_by_dense=dense_cell.kept.found_by_dense,
        rows=tuple(rows),
    )


def find_cell(summary: Summary, like: Cell) -> Cell | None:
    """A setting's cell of the same task and context; None where it was not run."""
    cells = (*summary.cells, *summary.contexts)
    place = like.task, like.context
    return next((cell for cell in cells if (cell.task, cell.context) == place), None)


def covers_all(summary: Summary, dense: Summary) -> bool:
    """Whether a setting was run wherever dense was: else its means are of other prompts."""
    return len(summary.cells) == len(dense.cells)


def short_names(settings: Sequence[str]) -> list[str]:
    """Names that fit a table: "dense", "tidal 1", "tidal 2", "quest 1"; presets as they are."""
    names: list[str] = []
    counts: dict[str, int] = {}
    for setting in settings:
        kind = setting.partition(" ")[0]
        if kind == "dense" or is_preset(setting):
            names.append(setting)
        else:
            counts[kind] = counts.get(kind, 0) + 1
            names.append(f"{kind} {counts[kind]}")
    return names


def cell_title(cell: Cell) -> str:
    """A task, and its context where it has one."""
    return cell.task if cell.context is None else f"{cell.task}, {cell.context:,} tokens"


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.1f}"


def show_kept(kept: Kept) -> str:
    """The share in percent and its interval; NOTHING where dense finds no answer."""
    if kept.share is None or kept.low is None or kept.high is None:
        return NOTHING
    return f"{percent(kept.share)} ({percent(kept.low)}-{percent(kept.high)})"


def show_megabytes(kv_bytes: int | None) -> str:
    """Bytes in MB of a million; empty where they were not counted."""
    if kv_bytes is None:
        return ""
    megabytes = kv_bytes / 1e6
    return f"{megabytes:,.0f}" if megabytes >= 100 else f"{megabytes:.3g}"


def show_set_size(mean: float) -> str:
    """Positions of a set; empty where every step is dense."""
    return f"{mean:,.0f}" if mean else ""
