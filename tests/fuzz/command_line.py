"""Runs a command of the command line in this process, for the targets."""

from __future__ import annotations

import contextlib
import io
import re

from judge import Nonsense
from tidaldecode.cli.app import main


class CommandFailed(Exception):
    """Raised where a command met an error that it did not expect; the text is what it said."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        named = re.search(r"error: (\w+): ", said)
        self.what = f"{named[1]} in a command" if named else "traceback of a command"


def run_command(*arguments: str) -> tuple[int, str]:
    """The exit code and what was written to stderr.

    Raises: CommandFailed for an error of no kind that the package knows.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    said = err.getvalue()
    if "run again with --debug" in said or "Traceback" in said:
        raise CommandFailed(f"{arguments[0]}: {said[-300:]}")
    if code not in (0, 1, 2, 3):
        raise Nonsense(f"{arguments[0]}: exit code {code}")
    return code, said
