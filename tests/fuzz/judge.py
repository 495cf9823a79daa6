"""What a case came to, and whether that is a fault: the one rule that all targets share.

worker.py judges what a case raised in its process; supervisor.py adds what only an outsider sees
(a crash, a hang, too much memory). A fault's signature is equal for equal causes, so that a
thousand cases with one cause are one line of the report.
"""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass

from hostile_values import CallersError
from tidaldecode import TidalError

FAULTS = ("untyped", "pybind", "nonsense", "crash", "hang", "slow", "frozen", "memory")

# Python's own words for a call of the wrong shape, which stay a TypeError.
_CALL_SHAPE = re.compile(
    r"unexpected keyword argument|missing \d+ required|takes .* positional argument"
    r"|multiple values for|takes no keyword arguments|takes \d+ or \d+ arguments"
)
_PYBIND = re.compile(r"incompatible (function|constructor) arguments|Invoked with:|_core\.")


class Nonsense(AssertionError):
    """Raised by a target: the call succeeded, and what it gave or took cannot be right."""


@dataclass(frozen=True)
class Outcome:
    """How one case ended."""

    kind: str  # "ok", "refused", "usage", "caller", or one of FAULTS
    what: str = ""  # type of the error, or what was seen
    where: str = ""  # place in the package where it came up
    message: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether the case found something that must be mended."""
        return self.kind in FAULTS

    def signature(self, group: str) -> str:
        """A name for the cause; `group`, what the case was about, is for an unknown place."""
        return f"{self.kind}: {self.what} at {self.where or group}"


def judge(error: BaseException | None) -> Outcome:
    """What it means that a case raised `error`; None is success."""
    if error is None or isinstance(error, StopIteration):
        return Outcome("ok")
    name, text = type(error).__name__, " ".join(_text_of(error).split())
    if isinstance(error, Nonsense):
        return Outcome("nonsense", text[:120], "", text)
    if isinstance(error, CallersError):
        return Outcome("caller", name)
    if _PYBIND.search(text):
        return Outcome("pybind", name, _place(error), text)
    if isinstance(error, TidalError):
        if not text.isprintable() or not text or len(text) > 4000:
            what = f"message of a {name}: not one printable line"
            return Outcome("nonsense", what, _place(error), text)
        return Outcome("refused", name)
    if isinstance(error, TimeoutError):  # as asked
        return Outcome("refused", name)
    if isinstance(error, TypeError) and _CALL_SHAPE.search(text):
        return Outcome("usage", name)
    return Outcome("untyped", getattr(error, "what", name), _place(error), text)


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as cause:
        return f"(no text: {type(cause).__name__})"


def _place(error: BaseException) -> str:
    """The innermost function of the package that the error passed through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = frame.filename.replace("\\", "/")
        if "/tidaldecode/" in path:
            return f"{path.rpartition('/tidaldecode/')[2]}:{frame.name}"
    return ""
