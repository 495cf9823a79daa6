"""Answers kept of those that the dense model finds, and how sure that share is.

Used by report.py and interval.py. A prompt that the dense model does not answer in full says
nothing about a plan: it does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from tidaldecode.evaluation.results import Place, Record

_FULL = 1.0  # score of an output that has every answer
_Z = 1.959963984540054  # of the normal distribution: 95 % lie between -_Z and _Z


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A setting against the dense model on the same prompts; None where dense finds nothing."""

    found_by_dense: int
    answers: int  # of those, found in this setting too
    share: float | None
    low: float | None  # of the 95 % Wilson interval of the share
    high: float | None

    @property
    def width(self) -> float:
        """How far the ends of the interval are apart; 1 where nothing is known."""
        return 1.0 if self.low is None or self.high is None else self.high - self.low


def count_kept(records: Sequence[Record], dense: Mapping[Place, Record]) -> Kept:
    """Counts the answers of one setting's records.

    Args:
        records: of the setting.
        dense: the dense records of at least the same prompts, by Record.place.
    """
    found = [record for record in records if dense[record.place].score >= _FULL]
    kept = sum(record.score >= _FULL for record in found)
    if not found:
        return Kept(found_by_dense=0, answers=0, share=None, low=None, high=None)
    low, high = wilson_interval(kept, len(found))
    return Kept(
        found_by_dense=len(found), answers=kept, share=kept / len(found), low=low, high=high
    )


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `count` in `total` were seen (Wilson, JASA 22, 1927).

    Args:
        count: from 0 to total.
        total: at least 1.

    Returns: (low, high), both from 0 to 1.
    """
    share = count / total
    spread = _Z * _Z / total
    centre = share + spread / 2
    reach = sqrt(spread * (share * (1 - share) + spread / 4))
    low, high = (centre - reach) / (1 + spread), (centre + reach) / (1 + spread)
    # Rounding would leave an end of 1 or 0 just beside it.
    return (low if count else 0.0), (high if count < total else 1.0)
