"""A lock that a forked child cannot wait for."""

from __future__ import annotations

import os
import threading

from tidaldecode.errors import UnsupportedError


class CallLock:
    """One thread at a time; the thread that holds it may take it again.

    A child made by os.fork() has its parent's locks as they were, and none of the threads that
    would release them. There taking the lock is an error instead of a wait for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process = os.getpid()

    @property
    def is_foreign(self) -> bool:
        """Whether this process was forked from the one that made the lock."""
        return self._process != os.getpid()

    def __enter__(self) -> None:
        """Raises: UnsupportedError in a forked child."""
        if self.is_foreign:
            raise UnsupportedError(
                "decoder: it belongs to the process that this one was forked from; create a new "
                'Decoder here, or start processes with the method "spawn"'
            )
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()
