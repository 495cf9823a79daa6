"""Searches for inputs that the package does not take well: `make fuzz`, `make fuzz-short`.

    python tests/fuzz/fuzz.py [api|folders|tokenizers|templates|files|plans|all]
        --seconds N | --short [--seed S] [--jobs J] [--case K] [--json FILE]

A case is made from (target, seed, number) alone, runs in a worker process (worker.py) and is judged
by one rule (judge.py). Faults are counted by cause, each with the smallest case found for it. The
cases of corpus/ run first: what was once found stays found. The exit code is 1 if there is a fault.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import random
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from judge import Outcome
from supervisor import Limits, Worker

# Each with the cases of a short run, which take some 20 s.
TARGETS = {
    "api": 2000,
    "folders": 900,
    "tokenizers": 100,
    "templates": 14,
    "files": 90,
    "plans": 8000,
}
CORPUS = Path(__file__).with_name("corpus")
_MOST_REDUCTIONS = 40  # cases tried to make a reproducer smaller
_COSTLY = ("hang", "slow", "frozen", "memory")  # whose reproducers are kept as they are


@dataclass
class Fault:
    """One cause: how often it was met, and how to meet it again."""

    count: int
    case_number: int | str  # for --case, or the name of the corpus file
    message: str
    reproducer: str
    case: dict[str, Any]


@dataclass
class Report:
    """What a campaign on one target has seen."""

    target: str
    seed: int
    cases: int = 0
    seconds: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """The report for people."""
        ordered = sorted(self.outcomes.items(), key=lambda item: -item[1])
        counts = ", ".join(f"{kind} {count}" for kind, count in ordered)
        head = f"{self.target}: {self.cases} cases in {self.seconds:.0f} s, seed {self.seed}"
        yield f"{head}: {counts}"
        for signature, fault in sorted(self.faults.items(), key=lambda item: -item[1].count):
            yield f"  {fault.count} x {signature}"
            yield f"      {fault.message[:240]}"
            yield f"      case {fault.case_number}: {fault.reproducer[:600]}"


class Campaign:
    """Cases of one target, until the time is over."""

    def __init__(self, target: str, seed: int) -> None:
        self._name = target
        self._module = importlib.import_module(f"target_{target}")
        self._limits: Limits = getattr(self._module, "LIMITS", Limits())
        self._lock = threading.Lock()
        self.report = Report(target, seed)

    def case(self, number: int) -> dict[str, Any]:
        """The case of a number: always the same one for a seed."""
        rng = random.Random(f"{self._name}:{self.report.seed}:{number}")
        made: dict[str, Any] = self._module.make_case(rng)
        return made

    def worker(self) -> Worker:
        """A process for cases of this target."""
        return Worker(f"target_{self._name}", self._limits)

    def run(self, seconds: float, jobs: int, cases: int = 2**63) -> Report:
        """The corpus, then cases 0, 1, 2, ... by as many workers as there are jobs."""
        started = time.monotonic()
        self._replay_corpus()
        deadline = started + seconds
        numbers = iter(range(cases))
        threads = [
            threading.Thread(target=self._work, args=(numbers, deadline)) for _ in range(jobs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.report.seconds = time.monotonic() - started
        return self.report

    def _replay_corpus(self) -> None:
        with self.worker() as worker:
            for path in sorted(CORPUS.glob("*.json")):
                entry = json.loads(path.read_text())
                if entry["target"] == self._name:
                    self._note(path.name, entry["case"], worker.run(entry["case"]), worker)

    def _work(self, numbers: Iterator[int], deadline: float) -> None:
        with self.worker() as worker:
            for number in numbers:
                if time.monotonic() > deadline:
                    break
                case = self.case(number)
                self._note(number, case, worker.run(case), worker)

    def _note(
        self, number: int | str, case: dict[str, Any], outcome: Outcome, worker: Worker
    ) -> None:
        signature = outcome.signature(self._module.group(case)) if outcome.is_fault else ""
        with self._lock:
            self.report.cases += 1
            outcomes = self.report.outcomes
            outcomes[outcome.kind] = outcomes.get(outcome.kind, 0) + 1
            if not signature:
                return
            if signature in self.report.faults:
                self.report.faults[signature].count += 1
                return
            fault = Fault(1, number, outcome.message, self._module.describe(case), case)
            self.report.faults[signature] = fault
        if outcome.kind not in _COSTLY:
            fault.case = self._reduced(case, outcome, worker)
            fault.reproducer = self._module.describe(fault.case)

    def _reduced(self, case: dict[str, Any], outcome: Outcome, worker: Worker) -> dict[str, Any]:
        """A smaller case of the same outcome."""
        tries = 0
        is_smaller = True
        while is_smaller:
            is_smaller = False
            for candidate in self._module.smaller(case):
                if (tries := tries + 1) > _MOST_REDUCTIONS:
                    return case
                own = worker.run(candidate)
                if (own.kind, own.what, own.where) == (outcome.kind, outcome.what, outcome.where):
                    case, is_smaller = candidate, True
                    break
        return case


def run_one(campaign: Campaign, number: int) -> int:
    """Runs and shows one case."""
    case = campaign.case(number)
    with campaign.worker() as worker:
        outcome = worker.run(case)
    print(json.dumps(case, indent=2))
    print(importlib.import_module(f"target_{campaign.report.target}").describe(case))
    print(json.dumps(asdict(outcome), indent=2))
    return int(outcome.is_fault)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="?", default="all", choices=(*TARGETS, "all"))
    parser.add_argument("--seconds", type=float, default=60.0, help="of all targets together")
    parser.add_argument(
        "--short", action="store_true", help="a fixed number of cases, however long they take"
    )
    parser.add_argument("--seed", type=int, default=None, help="default: a random one, printed")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--case", type=int, default=None, help="run this case alone and show it")
    parser.add_argument("--json", type=Path, default=None, help="write the report here too")
    return parser.parse_args()


def main() -> int:
    """The command."""
    asked = _arguments()
    seed = random.SystemRandom().randrange(2**31) if asked.seed is None else asked.seed
    names = tuple(TARGETS) if asked.target == "all" else (asked.target,)
    if asked.case is not None:
        return run_one(Campaign(names[0], seed), asked.case)
    print(f"seed {seed}", flush=True)
    reports = []
    for name in names:
        campaign = Campaign(name, seed)
        if asked.short:
            reports.append(campaign.run(math.inf, asked.jobs, TARGETS[name]))
        else:
            reports.append(campaign.run(asked.seconds / len(names), asked.jobs))
        print("\n".join(reports[-1].lines()), flush=True)
        if asked.json is not None:
            asked.json.parent.mkdir(parents=True, exist_ok=True)
            asked.json.write_text(json.dumps([asdict(report) for report in reports], indent=1))
    num_faults = sum(len(report.faults) for report in reports)
    num_cases = sum(report.cases for report in reports)
    print(f"{num_cases} cases, {num_faults} causes of faults")
    return int(num_faults > 0)


if __name__ == "__main__":
    sys.exit(main())
