"""Puts the outcome of tests/gpu_test.sh into one JSON file: counts, device, commit."""

import argparse
import datetime
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from tidaldecode import _core

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from provenance import commit  # noqa: E402


def gtest_counts(paths: list[Path]) -> dict[str, int]:
    reports = [json.loads(path.read_text()) for path in paths]
    suites = [suite for report in reports for suite in report["testsuites"]]
    cases = [case for suite in suites for case in suite["testsuite"]]
    skipped = sum(case.get("result") == "SKIPPED" for case in cases)
    failed = sum(report["failures"] for report in reports)
    return {
        "passed": len(cases) - skipped - failed,
        "failed": failed,
        "skipped": skipped,
        "on_cuda": sum("cuda" in case["name"].lower() for case in cases),
    }


def pytest_counts(path: Path) -> dict[str, int]:
    suite = ET.parse(path).getroot().find("testsuite")
    count = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return {
        "passed": count["tests"] - failed - count["skipped"],
        "failed": failed,
        "skipped": count["skipped"],
    }


def sanitizer_summary(path: Path) -> str:
    return path.read_text().strip().splitlines()[-1].lstrip("= ") if path.exists() else "not run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--shards", type=int, required=True, help="processes of the C++ tests")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    # A process that ended without a report must not look like one without failures.
    shards = [args.build / f"gtest-{shard}.json" for shard in range(args.shards)]
    report = {
        "command": "make gpu-test",
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "devices": [d for d in _core.list_devices() if d["name"].startswith("cuda")],
        "libraries": _core.list_libraries(),
        "gtest": gtest_counts(shards),
        "pytest": pytest_counts(args.build / "pytest.xml"),
        "memcheck": sanitizer_summary(args.build / "memcheck.log"),
        "racecheck": sanitizer_summary(args.build / "racecheck.log"),
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
