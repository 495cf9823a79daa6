"""The report as pictures: PNG files with matplotlib, which is an optional extra.

Called by command.py. Only what was measured is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

from tidaldecode.errors import UnsupportedError
from tidaldecode.evaluation.attention import AttentionReport
from tidaldecode.evaluation.report import Summary
from tidaldecode.evaluation.results import Record

_NEEDLE_TASK = "single"
_SIZE = (7.0, 4.2)  # inches
_RESOLUTION = 120  # dots an inch


def load_matplotlib() -> ModuleType:
    """matplotlib.pyplot, drawing into files.

    Raises: UnsupportedError if it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UnsupportedError(
            "plots: matplotlib is not installed; pip install 'tidaldecode[plots]', or leave "
            "--plots out"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_report(
    folder: Path,
    summaries: Sequence[Summary],
    records: Sequence[Record],
    attention: AttentionReport | None,
) -> list[Path]:
    """Writes what there is to draw.

    Returns: the files, those of an earlier run replaced.
    Raises: UnsupportedError if matplotlib is not installed.
    """
    pyplot = load_matplotlib()
    figures: dict[str, Any] = {}
    if summaries:
        figures["accuracy.png"] = _accuracy(pyplot, summaries)
    needles = [record for record in records if record.task == _NEEDLE_TASK]
    if needles:
        figures["needle.png"] = _needle(pyplot, needles)
    if attention is not None:
        figures["overlap.png"] = _overlap(pyplot, attention)
        if attention.masses:
            figures["mass.png"] = _mass(pyplot, attention)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=_RESOLUTION)
        pyplot.close(figure)
    return [folder / name for name in figures]


def _new_figure(pyplot: ModuleType, columns: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    figure, axes = pyplot.subplots(
        1, columns, figsize=_SIZE, squeeze=False, layout="constrained", **options
    )
    return figure, list(axes[0])


def _split_budget(summary: Summary) -> tuple[str, float]:
    """The setting without its budget, and the budget: where it says no number, the mean set's."""
    words = summary.setting.split()
    budgets = [word.partition("=")[2] for word in words if word.startswith("token_budget=")]
    rest = " ".join(word for word in words if not word.startswith("token_budget="))
    return rest, int(budgets[0]) if budgets not in ([], ["auto"]) else summary.mean_set_size


def _accuracy(pyplot: ModuleType, summaries: Sequence[Summary]) -> Any:
    """Mean (solid) and worst task (dotted) over the budget, a line per setting."""
    figure, (axis,) = _new_figure(pyplot)
    lines: dict[str, list[tuple[float, Summary]]] = {}
    for summary in summaries[1:]:
        name, budget = _split_budget(summary)
        if budget:  # 0: no step was sparse
            lines.setdefault(name, []).append((budget, summary))
    for name, points in lines.items():
        points.sort(key=lambda point: point[0])
        budgets = [budget for budget, _ in points]
        means = [100 * summary.mean_score for _, summary in points]
        worst = [100 * summary.worst.score for _, summary in points]
        (line,) = axis.plot(budgets, means, marker="o", label=name)
        axis.plot(budgets, worst, marker=".", linestyle=":", color=line.get_color())
    axis.axhline(100 * summaries[0].mean_score, color="black", linewidth=1, label="dense")
    axis.set_xscale("log", base=2)
    axis.set_xlabel("token budget, or positions of a set")
    axis.set_ylabel("score in % (dotted: worst task)")
    axis.set_ylim(-3, 103)
    figure.legend(loc="outside lower center", fontsize="xx-small")
    return figure


def _needle(pyplot: ModuleType, records: Sequence[Record]) -> Any:
    """Depth by length, a field per setting."""
    settings = list(dict.fromkeys(record.setting for record in records))
    contexts = sorted({record.context or record.prompt_tokens for record in records})
    depths = sorted({record.depth or 0.0 for record in records})
    figure, axes = _new_figure(pyplot, len(settings), sharey=True)
    for axis, setting in zip(axes, settings, strict=True):
        cells: dict[tuple[float, int], list[float]] = {}
        for record in records:
            if record.setting == setting:
                place = (record.depth or 0.0, record.context or record.prompt_tokens)
                cells.setdefault(place, []).append(record.score)
        grid = [
            [fmean(cells.get((depth, context), [float("nan")])) for context in contexts]
            for depth in depths
        ]
        axis.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="RdYlGn")
        axis.set_xticks(range(len(contexts)), [f"{context // 1024}K" for context in contexts])
        axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        axis.set_title("\n".join(setting.split()), fontsize="xx-small")
    axes[0].set_ylabel("depth of the needle")
    return figure


def _mass(pyplot: ModuleType, attention: AttentionReport) -> Any:
    """By layer, a line per setting."""
    figure, (axis,) = _new_figure(pyplot)
    for entry in attention.masses:
        values = [float("nan") if value is None else 100 * value for value in entry.mass]
        axis.plot(range(len(values)), values, marker="o", label=entry.setting)
    axis.set_xlabel("layer")
    axis.set_ylabel("dense attention on the set, %")
    axis.set_title(f"{attention.context:,} tokens, {attention.num_prompts} prompts")
    axis.set_ylim(0, 103)
    figure.legend(loc="outside lower center", fontsize="xx-small")
    return figure


def _overlap(pyplot: ModuleType, attention: AttentionReport) -> Any:
    """Layer by layer."""
    figure, (axis,) = _new_figure(pyplot)
    image = axis.imshow(attention.overlap, vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, ax=axis, label="share of positions in common")
    axis.set_xlabel("layer")
    axis.set_ylabel("layer")
    axis.set_title(f"the best {attention.token_budget} of {attention.context:,} positions")
    return figure
