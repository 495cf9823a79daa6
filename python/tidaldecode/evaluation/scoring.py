"""From an output and the accepted answers to a score between 0 and 1.

RULER (arXiv 2404.06654, section 4) scores by the share of the answers that occur in the output.
Here an answer must stand there as a whole: 1234567 does not occur in 12345678.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def _occurs(answer: str, output: str) -> bool:
    pattern = r"\s+".join(re.escape(word) for word in answer.split())
    return re.search(rf"(?<!\w){pattern}(?!\w)", output, re.IGNORECASE) is not None


def share_found(output: str, answers: Sequence[str]) -> float:
    """The share of the answers that occur in the output."""
    return sum(_occurs(answer, output) for answer in answers) / len(answers)


def any_found(output: str, answers: Sequence[str]) -> float:
    """1 if one of the answers occurs in the output."""
    return float(any(_occurs(answer, output) for answer in answers))


def first_number(output: str, answers: Sequence[str]) -> float:
    """1 if the first number in the output is one of the answers."""
    found = re.search(r"\d+", output)
    return float(found is not None and found.group() in answers)


def share_copied(output: str, answers: Sequence[str]) -> float:
    """The longest share of an answer's words with which the output begins."""
    written = output.split()

    def share(answer: str) -> float:
        words = answer.split()
        count = 0
        while count < min(len(words), len(written)) and words[count] == written[count]:
            count += 1
        return count / len(words)

    return max(share(answer) for answer in answers)


RULES = {rule.__name__: rule for rule in (share_found, any_found, first_number, share_copied)}


def score(rule: str, output: str, answers: Sequence[str]) -> float:
    """Scores an output by the rule of this name."""
    return RULES[rule](output, answers)
