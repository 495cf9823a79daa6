"""Writes the table of features into tests/README.md: what ran on which device.

Takes what `pytest tests/python/test_features.py --feature-results FILE` has left, on a machine with
a GPU: tests/gpu_test.sh calls it. A feature that was not run, or failed, is shown as such.
"""

import argparse
import json
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS / "python"))
import checkpoint_runs  # noqa: E402, F401  adds its runs
import request_runs  # noqa: E402, F401  adds its runs
import server_runs  # noqa: E402, F401  adds its runs
from feature_runs import NAMES  # noqa: E402

COLUMNS = {"cpu float32": "CPU", "cuda bfloat16": "CUDA bf16", "cuda float16": "CUDA fp16"}
BEGIN, END = "<!-- features: begin -->\n", "<!-- features: end -->"
WORDS = {"passed": "yes", "failed": "fails", "skipped": "not run"}


def table(results: dict[str, str]) -> str:
    """Rows in the order of feature_runs.py.

    Args:
        results: outcome by "run-column", as pytest names its cases.
    """
    names: dict[str, list[str]] = {}
    for name, run in NAMES.items():
        names.setdefault(run, []).append(name)
    lines = [f"| feature | {' | '.join(COLUMNS.values())} |", "|---|" + "---|" * len(COLUMNS)]
    for run, features in names.items():
        listed = ", ".join(f"`{feature}`" for feature in features)
        cells = [WORDS.get(results.get(f"{run}-{column}", ""), "not run") for column in COLUMNS]
        lines.append(f"| {listed} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=TESTS / "README.md")
    args = parser.parse_args()
    before, rest = args.output.read_text().split(BEGIN)
    behind = rest.split(END, 1)[1]
    made = table(json.loads(args.results.read_text()))
    args.output.write_text(before + BEGIN + made + END + behind)


if __name__ == "__main__":
    main()
