"""What bench_decode.py shows: tables on the terminal, and the plot beside the JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Report = dict[str, Any]


def print_tables(console: Console, report: Report) -> None:
    if report["rows"]:
        console.print(step_table(report))
    for kind in ("attention", "prompt", "selection", "step"):
        rows = [row for row in report["peers"] if row["kind"] == kind]
        if rows:
            console.print(peer_table(kind, rows, report["ops"]))
    console.print(f"{report['device']}, commit {report['commit']}, {report['seconds']} s")


def step_table(report: Report) -> Table:
    table = Table(title=f"Milliseconds per decode step: {report['times']}")
    for title in (
        "model",
        "context",
        "batch",
        "attention",
        "ms",
        "floor ms",
        "x floor",
        "x dense",
        "tokens/s",
    ):
        is_text = title in ("model", "attention")
        table.add_column(title, justify="left" if is_text else "right", no_wrap=True)
    model = ""
    for row in report["rows"]:
        table.add_row(
            row["model"] if row["model"] != model else "",
            f"{row['context']:,}",
            str(row["batch_size"]),
            "almost none" if row["nearly_empty"] else row["attention"],
            f"{row['ms_per_step']:.3f}",
            number(row["floor_ms"], 3),
            number(row["ratio_to_floor"], 2),
            f"{row['x_dense']:.2f}",
            f"{row['tokens_per_s']:,.0f}",
        )
        model = row["model"]
    return table


def peer_table(kind: str, rows: list[Report], ops: list[Report]) -> Table:
    """One line per case; the engine's own op beside the attention peers if bench_ops ran."""
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    unit = "ms" if kind == "step" else "us"
    table = Table(title=f"{kind}: {'milliseconds' if unit == 'ms' else 'microseconds'} of peers")
    table.add_column(kind, no_wrap=True)
    table.add_column("context", justify="right", no_wrap=True)
    same = [op for op in ops if op.get("kv_dtype") != "fp8"]  # as the peers' caches
    ours = {op_label(op): op["us"] for op in same} if kind == "attention" else {}
    for title in (["tidaldecode"] if ours else []) + peers:
        table.add_column(title, justify="right")
    cells: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        cells.setdefault((case_label(row), row["context"]), {})[row["peer"]] = row[unit]
    for (label, context), values in cells.items():
        own = [number(ours.get((label, context)))] if ours else []
        table.add_row(label, f"{context:,}", *own, *(number(values.get(peer)) for peer in peers))
    return table


def case_label(row: Report) -> str:
    if "model" in row:
        return row["model"]
    if "rows" in row:
        return f"top {row['token_budget']} of {row['rows']} rows"
    heads = f"{row['num_q_heads']}/{row['num_kv_heads']} heads of {row['head_dim']}"
    return f"{heads}, batch {row['batch_size']}" if "batch_size" in row else f"{heads}, a prompt"


def op_label(op: Report) -> tuple[str, int]:
    """As the case a peer would have had."""
    keys = ("num_q_heads", "num_kv_heads", "head_dim", "batch_size")
    return case_label({key: op[key] for key in keys}), op["seq_len"]


def number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


# --- the plot ---


def plot(report: Report, path: Path, skip: Callable[[str], None]) -> None:
    """Milliseconds per step over context: one picture per model, one line per kind and batch."""
    try:
        import matplotlib
    except ImportError as error:
        return skip(f"plot: {error}; pip install '.[bench]'")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in report["rows"]))
    if not models:
        return skip("plot: nothing was measured")
    columns = min(2, len(models))
    lines = -(-len(models) // columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(5.6 * columns + 1, 4 * lines + 0.4), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    axes = list(grid.flat)
    for axis in axes[len(models) :]:
        axis.remove()
    for axis, model in zip(axes, models, strict=False):
        plot_model(axis, model, [row for row in report["rows"] if row["model"] == model])
    title = f"Decode steps on {report['device']}; dotted: the bytes that must be read"
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot_model(axis: Any, model: str, rows: list[Report]) -> None:
    from matplotlib.ticker import FuncFormatter

    colors, markers = {"dense": "tab:red", "tidal": "tab:blue"}, ("o", "s", "^", "D")
    batch_sizes = sorted({row["batch_size"] for row in rows})
    for batch_size, marker in zip(batch_sizes, markers, strict=False):
        for kind, color in colors.items():
            asked = [row for row in rows if row["batch_size"] == batch_size]
            line = sorted(
                (row for row in asked if row["attention"] == kind), key=lambda row: row["context"]
            )
            if not line:
                continue
            contexts = [row["context"] for row in line]
            axis.plot(
                contexts, [row["ms_per_step"] for row in line], color=color, marker=marker,
                fillstyle="full" if batch_size == batch_sizes[0] else "none",
                label=f"{kind}, batch {batch_size}",
            )  # fmt: skip
            if line[0]["floor_ms"] is not None:
                floors = [row["floor_ms"] for row in line]
                axis.plot(contexts, floors, ":", color=color, linewidth=1)
    axis.set_xticks(sorted({row["context"] for row in rows if not row["nearly_empty"]}))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1024:g}K"))
    axis.tick_params(axis="x", rotation=45)
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.set_title(model)
    axis.set_xlabel("tokens in the cache")
    axis.set_ylabel("ms per step")
    axis.grid(alpha=0.3)
    axis.legend()
