"""The command line's manners: progress bars, errors on one line, quiet when nobody watches."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from tidaldecode.batch import PrefillProgress

# A bar for less would be gone before it is seen.
_MIN_TOKENS_FOR_BAR = 2048
_MIN_BYTES_FOR_BAR = 64 * 1024 * 1024


def is_watched() -> bool:
    """True if a person sees both outputs: only then are bars and summaries worth writing."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def one_line(message: str) -> str:
    """`message` without line breaks and control characters (names in a folder may hold them)."""
    joined = " ".join(message.split())
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in joined)


def print_error(message: str) -> None:
    """One line on stderr."""
    print(f"error: {one_line(message)}", file=sys.stderr)


def print_note(message: str) -> None:
    """One line on stderr, for things worth knowing that are no errors."""
    print(f"note: {one_line(message)}", file=sys.stderr)


class NoteHandler(logging.Handler):
    """Shows the package's log lines as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        print_note(record.getMessage())


class Bars:
    """Progress bars on stderr, gone when their work is done; none if nobody watches."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown

    def loading(self, title: str) -> AbstractContextManager[PrefillProgress]:
        """A bar for bytes of weights."""
        return self._bar(title, _MIN_BYTES_FOR_BAR)

    def reading(self, title: str) -> AbstractContextManager[PrefillProgress]:
        """A bar for tokens of a prompt."""
        return self._bar(title, _MIN_TOKENS_FOR_BAR)

    def counting(self, title: str) -> AbstractContextManager[PrefillProgress]:
        """A bar for things that take a second or more each."""
        return self._bar(title, 0)

    @contextmanager
    def _bar(self, title: str, minimum: int) -> Iterator[PrefillProgress]:
        if not self._shown:
            yield lambda done, total: None
            return
        # Imported by who shows a bar: it takes as long as opening a small model.
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        task = progress.add_task(title, total=None)
        is_running = False

        def update(done: int, total: int) -> None:
            nonlocal is_running
            if total < minimum:
                return
            progress.update(task, completed=done, total=total)
            if done < total and not is_running:
                progress.start()
                is_running = True
            elif done >= total and is_running:
                progress.stop()
                is_running = False

        try:
            yield update
        finally:
            if is_running:
                progress.stop()
