"""Adds up answers kept over several runs of `tidaldecode eval`: a table, and a plot over bytes.

    python benchmarks/kept_report.py EVAL_FOLDER... [--plot FILE.png]

The runs are of one model and the same settings, with other seeds or contexts. Answers kept are
those of prompts that the dense model answers rightly; the intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidaldecode.evaluation.kept import wilson_interval

DENSE = "dense"
MARKS = {"S": "s", "P": "o", "": "x"}


@dataclass
class Row:
    """One setting over all runs, by context."""

    plan: str
    options: str
    found: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    kept: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    kv_bytes: dict[int, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """How many layers choose, of which kind, and their sets."""
        if set(self.plan) == {"F"}:
            return DENSE
        values = dict(part.split("=", 1) for part in self.options.split() if "=" in part)
        kinds = [f"{self.plan.count(kind)} {kind}" for kind in "SP" if kind in self.plan]
        parts = [" ".join(kinds), f"K={values.get('token_budget', '?')}"]
        parts += [values[name] for name in ("shadow", "granularity") if name in values]
        if int(values.get("recent_tokens", 0)) > int(values.get("token_budget", 0)) // 2:
            parts[0] = "sinks and recents"
        return " ".join(parts)

    def share(self) -> tuple[int, int, float, float]:
        """Kept and found over all contexts, and the interval."""
        kept, found = sum(self.kept.values()), sum(self.found.values())
        return kept, found, *wilson_interval(kept, found)


def read_rows(folders: Sequence[Path]) -> list[Row]:
    """The settings of all runs, in their order."""
    rows: dict[str, Row] = {}
    for folder in folders:
        report: dict[str, Any] = json.loads((folder / "report.json").read_text())
        for setting in report["settings"]:
            name = setting["setting"]
            row = rows.setdefault(name, Row(plan=setting["plan"], options=name))
            for cell in setting["contexts"]:
                context = cell["context"]
                row.found[context] += cell["kept"]["found_by_dense"]
                row.kept[context] += cell["kept"]["answers"]
                row.kv_bytes[context] = cell["kv_bytes"]
    return list(rows.values())


def print_table(rows: Sequence[Row]) -> None:
    """Markdown: answers kept by context and in all, and the share of the dense bytes."""
    contexts = sorted(rows[0].found)
    dense = rows[0].kv_bytes
    heads = [
        "plan",
        *(f"{n:,}" for n in contexts),
        "kept, %",
        *(f"read at {n:,}" for n in contexts),
    ]
    print("|", " | ".join(heads), "|")
    print("|" + "---|" * len(heads))
    for row in rows:
        kept, found, low, high = row.share()
        cells = [f"{row.kept[n]} of {row.found[n]}" for n in contexts]
        total = f"{100 * kept / found:.1f} ({100 * low:.0f}–{100 * high:.0f})"
        read = [f"{row.kv_bytes[n] / dense[n]:.0%}" for n in contexts]
        print("|", " | ".join([row.label, *cells, total, *read]), "|")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Answers kept over bytes, with intervals; bytes are the mean share over the contexts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.6))
    dense = rows[0].kv_bytes
    for row in rows[1:]:
        kept, found, low, high = row.share()
        share = kept / found
        read = sum(row.kv_bytes[n] / dense[n] for n in dense) / len(dense)
        kind = "" if row.label.startswith("sinks") else "P" if "P" in row.plan else "S"
        spread = [[100 * (share - low)], [100 * (high - share)]]
        mark = MARKS[kind]
        axes.errorbar(100 * read, 100 * share, yerr=spread, fmt=mark, capsize=3, label=row.label)
    axes.axhline(100, color="0.7", linewidth=0.8)
    axes.set_xlabel("bytes of keys and values a step reads, % of dense")
    axes.set_ylabel("answers kept, %")
    axes.legend(fontsize=7, ncols=2, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    rows = read_rows(arguments.folders)
    print_table(rows)
    if arguments.plot:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
