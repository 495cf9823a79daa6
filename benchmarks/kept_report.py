"""Adds up answers kept over several runs of `tidaldecode eval`: a table, and a plot over bytes.

    python benchmarks/kept_report.py MODEL_DIR RESULTS.jsonl... [--plot FILE.png]

The runs are of one model, with other seeds, contexts or settings; of a run that was cut off the
prompts count that all of its settings have answered. Answers kept are those of prompts that the
dense model answers rightly; intervals are Wilson's, 95 %; bytes are of a cache in 16 bits, with
sets of an adaptive plan as large as they were in the mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tidaldecode.checkpoint.model_folder import ModelFolder, read_model_folder
from tidaldecode.config import PlanConfig
from tidaldecode.evaluation.kept import wilson_interval
from tidaldecode.evaluation.settings import tidal_setting
from tidaldecode.plan_bytes import kv_bytes_per_step

DENSE = "dense"
KV_DTYPE = "bfloat16"
MARKS = {"S": "s", "P": "o", "": "x"}


@dataclass
class Row:
    """One setting over all runs, by context."""

    label: str
    kind: str  # of the layers that choose
    found: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    kept: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    read: dict[int, float] = field(default_factory=dict)  # bytes of a step, as a share of dense

    def share(self) -> tuple[int, int, float, float]:
        """Kept and found over all contexts, and the interval."""
        kept, found = sum(self.kept.values()), sum(self.found.values())
        return kept, found, *wilson_interval(kept, found)


def describe(folder: ModelFolder, name: str) -> tuple[str, str, PlanConfig]:
    """A setting's label, the kind of its choosing layers, and its plan."""
    if name == DENSE:
        return DENSE, "", PlanConfig()
    plan = tidal_setting(name.removeprefix("tidal")).plan(folder).config
    budget = plan.token_budget
    if plan.recent_tokens and plan.recent_tokens > budget // 2:
        return f"sinks and recents, K={budget:,}", "", plan
    kinds = {"S": plan.select_layers or (), "P": plan.scored_layers or ()}
    parts = [f"{len(layers)} {kind}" for kind, layers in kinds.items() if layers]
    parts += [f"K={budget:,}", plan.granularity or "layer"]
    parts += [f"mass {plan.top_p_mass:g}"] if plan.top_p_mass else []
    parts += ["4 bits"] if plan.shadow == "int4" else []
    return ", ".join(parts), "P" if kinds["P"] else "S", plan


def read_rows(folder: ModelFolder, files: Sequence[Path]) -> list[Row]:
    """The settings of all runs, in their order."""
    rows: dict[str, Row] = {}
    for file in files:
        records = [json.loads(line) for line in file.read_text().splitlines()]
        scores: dict[str, dict[Hashable, float]] = defaultdict(dict)
        for record in records:
            place = record["context"], record["task"], record["index"]
            scores[record["setting"]][place] = record["score"]
        asked = set.intersection(*(set(of_setting) for of_setting in scores.values()))
        found = [place for place in asked if scores[DENSE][place] == 1]
        for name, of_setting in scores.items():
            label, kind, plan = describe(folder, name)
            row = rows.setdefault(label, Row(label, kind))
            for place in found:
                row.found[place[0]] += 1
                row.kept[place[0]] += of_setting[place] == 1
            sizes: dict[int, list[float]] = defaultdict(list)
            for record in records:
                if record["setting"] == name:
                    sizes[record["context"]].append(record["set_size"])
            for context in {place[0] for place in found}:
                sized = plan
                if plan.top_p_mass:  # the sets are as large as their attention needs
                    size = max(1, round(statistics.fmean(sizes[context])))
                    sized = replace(plan, token_budget=size)
                read, dense = (
                    kv_bytes_per_step(folder.model, config, context, KV_DTYPE)
                    for config in (sized, PlanConfig())
                )
                row.read[context] = read / dense
    return list(rows.values())


def print_table(rows: Sequence[Row]) -> None:
    """Markdown: answers kept by context and in all, and the share of the dense bytes."""
    contexts = sorted(rows[0].found)
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
        read = [f"{100 * row.read[n]:.0f} %" for n in contexts]
        print("|", " | ".join([row.label, *cells, total, *read]), "|")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Answers kept over bytes, with intervals; bytes are the mean share over the contexts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 4.8))
    for row in rows:
        if row.label == DENSE:
            continue
        kept, found, low, high = row.share()
        share = kept / found
        read = sum(row.read.values()) / len(row.read)
        spread = [[100 * (share - low)], [100 * (high - share)]]
        axes.errorbar(
            100 * read, 100 * share, yerr=spread, fmt=MARKS[row.kind], capsize=3, label=row.label
        )
    axes.axhline(100, color="0.7", linewidth=0.8)
    axes.set_xlabel("keys and values a step reads, % of dense")
    axes.set_ylabel("answers kept, %")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    rows = read_rows(read_model_folder(arguments.model_dir), arguments.files)
    print_table(rows)
    if arguments.plot:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
