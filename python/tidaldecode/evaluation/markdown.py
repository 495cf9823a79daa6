"""The report for people: tables in Markdown, to be read as they are or put into a document.

Called by command.py; report.json holds the same and more.
"""

from __future__ import annotations

from collections.abc import Sequence

from tidaldecode.evaluation.perplexity import Perplexity
from tidaldecode.evaluation.report import Summary
from tidaldecode.evaluation.sections import (
    COLUMNS,
    make_sections,
    short_names,
    show_megabytes,
    show_set_size,
)


def as_markdown(
    title: str, summaries: Sequence[Summary], perplexities: Sequence[Perplexity]
) -> str:
    """The tables of a report, and which setting each row is."""
    entries: list[Summary | Perplexity] = [*summaries, *perplexities]
    plans = {entry.setting: entry.plan for entry in entries}
    names = dict(zip(plans, short_names(list(plans)), strict=True))
    lines = [f"# {_escaped(title)}", ""]
    for section in make_sections(summaries) if summaries else []:
        found = section.found_by_dense
        lines += [
            f"## {_escaped(section.title)}",
            "",
            f"{section.num_prompts} prompts, of which dense finds {found}; 95 % intervals.",
            "",
            *_table(("", *COLUMNS), [(names[row.setting], *row.values) for row in section.rows]),
            "",
        ]
    if perplexities:
        lines += ["## Perplexity", "", *_perplexity_table(perplexities, names), ""]
    lines += ["## Settings", ""]
    lines += _table(
        ("", "setting", "plan"),
        [(names[setting], setting, plan) for setting, plan in plans.items()],
    )
    return "\n".join(lines) + "\n"


def _perplexity_table(perplexities: Sequence[Perplexity], names: dict[str, str]) -> list[str]:
    columns = ("context", "", "perplexity", "over dense, %", "KL, nats", "KV MB a step", "set")
    rows = [
        (
            f"{entry.context:,}",
            names[entry.setting],
            f"{entry.perplexity:.3f}",
            f"{100 * entry.over_dense:+.2f}",
            f"{entry.kl:.4f}",
            show_megabytes(entry.kv_bytes),
            show_set_size(entry.set_size),
        )
        for entry in sorted(perplexities, key=lambda entry: entry.context)
    ]
    return _table(columns, rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(map(_escaped, line)) + " |" for line in lines]


def _escaped(text: str) -> str:
    """Text that a table's cell or a heading holds as it is."""
    return " ".join(text.replace("|", "\\|").split())
