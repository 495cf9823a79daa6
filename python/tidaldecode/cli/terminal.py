"""The command line's manners: progress bars, errors on one line, quiet when nobody watches.

rich is imported by what shows something with it: that takes as long as opening a small model.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING

from tidaldecode.batch import PrefillProgress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

# A bar for less would be gone before it is seen.
_MIN_TOKENS_FOR_BAR = 2048
_MIN_BYTES_FOR_BAR = 64 * 1024 * 1024
SECONDS_BETWEEN_LINES = 60.0
# Counts beyond it (bytes, tokens) are shown in percent.
_MAX_COUNT = 9999
_WIDEST = 100_000  # columns; no table is wider


def is_watched() -> bool:
    """True if a person sees both outputs: only then are bars and summaries worth writing."""
    outputs = (sys.stdout, sys.stderr)  # None where a shell has closed them
    return all(output is not None and output.isatty() for output in outputs)


def one_line(message: str) -> str:
    """`message` without line breaks and control characters (names in a folder may hold them)."""
    joined = " ".join(message.split())
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in joined)


def without_line_break(text: str) -> str:
    """`text` without the one line break at its end, of Unix or of Windows."""
    shorter = text.removesuffix("\n")
    return shorter if shorter == text else shorter.removesuffix("\r")


def say(line: str) -> None:
    """Writes a line on stderr. What stderr does not take is lost, and nothing ends because of that.

    A disk may be full, or a reader gone, and a server goes on all the same.
    """
    if sys.stderr is not None:
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def drop_unsaid() -> None:
    """Throws away what stderr has not taken: at its end Python would make an error of it."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def print_error(message: str) -> None:
    """One line on stderr."""
    say(f"error: {one_line(message)}")


def print_note(message: str) -> None:
    """One line on stderr, for things worth knowing that are no errors."""
    say(f"note: {one_line(message)}")


def whole_width(console: Console, table: Table) -> int:
    """Columns of the terminal that a table takes with nothing left out."""
    from rich.measure import Measurement

    options = console.options.update(width=_WIDEST)
    return Measurement.get(console, options, table).maximum


def print_whole(console: Console, table: Table) -> None:
    """Prints a table with nothing left out; on a terminal that is too narrow lines wrap."""
    from rich.console import Console

    width = max(console.width, whole_width(console, table))
    Console(file=console.file, width=width, highlight=False, markup=False).print(table)


class NoteHandler(logging.Handler):
    """Shows the package's log lines as notes; the same several times in a row once."""

    _last = ""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message != self._last:
            self._last = message
            print_note(message)


class Bars:
    """Progress on stderr: bars that are gone when their work is done, or a line a minute.

    Bars are for a person who watches; a pipe or a file gets lines, so that no long run is silent.
    """

    def __init__(self, shown: bool) -> None:
        """
        Args:
            shown: whether a person watches.
        """
        self._shown = shown
        self._running: list[Progress] = []  # at most one; rich shows no two at once
        self._said_at = time.monotonic()

    def loading(self, title: str) -> AbstractContextManager[PrefillProgress]:
        """A bar for bytes of weights."""
        return self._bar(title, _MIN_BYTES_FOR_BAR)

    def reading(self, title: str) -> AbstractContextManager[PrefillProgress]:
        """A bar for tokens of a prompt."""
        return self._bar(title, _MIN_TOKENS_FOR_BAR)

    def counting(self, title: str) -> AbstractContextManager[PrefillProgress]:
        """A bar for things that take a second or more each."""
        return self._bar(title, 0)

    def _bar(self, title: str, minimum: int) -> AbstractContextManager[PrefillProgress]:
        return self._drawn(title, minimum) if self._shown else self._said(title)

    @contextmanager
    def _said(self, title: str) -> Iterator[PrefillProgress]:
        """A line whenever a minute has passed since the last one, whoever's it was."""
        started = time.monotonic()

        def update(done: int, total: int) -> None:
            now = time.monotonic()
            if now - self._said_at < SECONDS_BETWEEN_LINES or not 0 < done < total:
                return
            self._said_at = now
            left = (now - started) * (total - done) / done
            counted = f"{100 * done // total} %" if total > _MAX_COUNT else f"{done} of {total}"
            say(f"{title}: {counted}, {_minutes(left)} left")

        yield update

    @contextmanager
    def _drawn(self, title: str, minimum: int) -> Iterator[PrefillProgress]:
        progress = self._running[0] if self._running else _new_progress()
        is_outer = not self._running
        task = progress.add_task(title, total=None, visible=False)

        def update(done: int, total: int) -> None:
            if total < minimum:
                return
            progress.update(task, completed=done, total=total, visible=done < total)
            if is_outer and done < total and not self._running:
                progress.start()
                self._running.append(progress)
            elif is_outer and done >= total and self._running:
                progress.stop()
                self._running.clear()

        try:
            yield update
        finally:
            progress.remove_task(task)
            if is_outer and self._running:
                progress.stop()
                self._running.clear()


def _new_progress() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _minutes(seconds: float) -> str:
    return "less than a minute" if seconds < 60 else f"about {round(seconds / 60):,} min"
