"""Asks prompts until it is known well enough which share of the dense answers is kept.

Called by command.py for --interval.
"""

from __future__ import annotations

from collections.abc import Sequence

from tidaldecode.evaluation.example import Example, Series
from tidaldecode.evaluation.kept import count_kept
from tidaldecode.evaluation.results import Record, ResultFile
from tidaldecode.evaluation.runner import Reporter, Run, Runner

LEAST_ASKED = 10  # of a task at a context
MOST_ASKED = 500


def run_until_known(
    work: Run,
    series: Sequence[Series],
    width: float,
    results: ResultFile[Record],
    reporter: Reporter,
) -> tuple[list[Example], list[Record]]:
    """Asks every series until each setting's interval of answers kept is at most `width` wide.

    At least LEAST_ASKED prompts of each, as far as it has so many. What is asked next depends on
    the records so far alone, so a run that was cut off asks the same.

    Args:
        work: what is compared; the first setting is dense.
        series: the tasks at their contexts.
        width: of 95 % Wilson intervals, between 0 and 1.
        results: what an earlier run has left; what is found is added.
        reporter: where progress shows.

    Returns: (examples that were asked, their records setting by setting).
    Raises: as run().
    """
    examples: list[list[Example]] = [[] for _ in series]
    records: list[list[Record]] = [[] for _ in series]
    places = list(range(len(series)))
    room = max(entry.room for entry in series)
    with (
        Runner(work, room, results, reporter) as runner,
        reporter.counting("Prompts") as on_done,
    ):
        while places:
            for place in places:
                example = series[place].make(len(examples[place]))
                examples[place].append(example)
                records[place] += runner.ask(example)
                num_asked = sum(map(len, examples))
                on_done(num_asked, num_asked + len(places))  # at least so many are left
            places = [
                place
                for place in places
                if _asks_on(series[place], len(examples[place]), widest(records[place]), width)
            ]
        num_asked = sum(map(len, examples))
        on_done(num_asked, num_asked)
        asked = [example for own in examples for example in own]
        return asked, runner.in_order([record for own in records for record in own])


def _asks_on(series: Series, num_asked: int, found: float, width: float) -> bool:
    return num_asked < series.most and (num_asked < LEAST_ASKED or found > width)


def widest(records: Sequence[Record]) -> float:
    """The width of the widest interval of the settings beside dense, which is the first; else 0."""
    by_setting: dict[str, list[Record]] = {}
    for record in records:
        by_setting.setdefault(record.setting, []).append(record)
    dense_records, *others = by_setting.values()
    dense = {record.place: record for record in dense_records}
    return max((count_kept(own, dense).width for own in others), default=0.0)
