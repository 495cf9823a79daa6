"""Rows and pages that calls of several threads share: whose turn it is, and waiting for others.

Used by batch.py, decoder.py and session.py. A call that finds no batch row or no page free waits
while other threads are at work whose rows and pages come back. It never waits for what its own
thread holds, for a session between its turns, or for a stream that nobody reads.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from tidaldecode import _core
from tidaldecode.call_lock import CallLock
from tidaldecode.errors import CapacityError

T = TypeVar("T")

# How long a stream may go unread until nobody waits for it any longer.
STALLED_SECONDS = 30.0
_POLL_SECONDS = 0.01


class NoRoomNow(CapacityError):
    """Rows or pages that would suffice are held by others at this time."""


def start_now(begin: Callable[[], T]) -> T:
    """begin(), of what would fit if nothing else ran.

    Raises: NoRoomNow for its CapacityError.
    """
    try:
        return begin()
    except CapacityError as error:
        raise NoRoomNow(str(error)) from error


class _Caller(Protocol):
    """Callbacks of batch.py, as far as waiting needs them."""

    def wants_stop(self) -> bool: ...


class _Request(Protocol):
    """Request of batch.py, as far as an account of it needs."""

    @property
    def prompt_ids(self) -> list[int]: ...


class StreamedGeneration:
    """A generation that its reader advances, with a note of which thread did so, and when last."""

    def __init__(self, generation: _core.Generation, room: Room) -> None:
        self._generation = generation
        self._room = room
        self._thread = threading.current_thread()
        self._last_read = time.monotonic()

    def advance(self) -> list[tuple[int, int]]:
        """As in the engine."""
        self._thread = threading.current_thread()
        self._last_read = math.inf
        try:
            return self._generation.advance()
        finally:
            self._last_read = time.monotonic()

    def stop(self, sequence: int, reason: str = "stop") -> None:
        """As in the engine."""
        self._generation.stop(sequence, reason)

    def results(self) -> list[_core.SequenceResult]:
        """As in the engine."""
        return self._generation.results()

    @property
    def done(self) -> bool:
        """As in the engine."""
        return self._generation.done

    @property
    def prefill_progress(self) -> tuple[int, int]:
        """As in the engine."""
        return self._generation.prefill_progress

    def close(self) -> None:
        """Gives row and pages back."""
        self._room.forget(self)
        self._generation.close()

    def is_read_elsewhere(self) -> bool:
        """Whether another thread is at work on it."""
        is_own = self._thread is threading.current_thread()
        return not is_own and time.monotonic() - self._last_read < STALLED_SECONDS


class Room:
    """What the calls of one decoder share."""

    def __init__(self) -> None:
        # Calls that run to their end take turns: together they might not fit.
        self.turn = CallLock()
        self._lock = threading.Lock()
        self._streams: set[StreamedGeneration] = set()

    def forget(self, stream: StreamedGeneration) -> None:
        """Drops the note, once the stream holds nothing any more."""
        with self._lock:
            self._streams.discard(stream)

    def will_come_back(self) -> bool:
        """Whether other threads are at work whose rows and pages come back."""
        if self.turn.is_held_elsewhere():
            return True
        with self._lock:
            streams = [*self._streams]
        return any(stream.is_read_elsewhere() for stream in streams)

    @contextmanager
    def started(
        self, begin: Callable[[], T], caller: _Caller, turn: AbstractContextManager[Any]
    ) -> Iterator[T | None]:
        """begin(), tried again while it finds no room that others will give back.

        Args:
            begin: takes rows and pages; NoRoomNow of it is waited for.
            caller: may end the waiting.
            turn: held while begin() runs and in the with block, and not while this waits, for
                others may need it to come to their end.

        Returns: what begin() does; None if the caller has had enough before.
        Raises: CapacityError where waiting would not help, and whatever else begin() does.
        """
        while True:
            with turn:
                try:
                    value = begin()
                except NoRoomNow as error:
                    if not self.will_come_back():
                        raise CapacityError(
                            f"{error} (held by sessions, by streams of this "
                            "thread, or by some that nobody reads)"
                        ) from None
                else:
                    yield value
                    return
            if caller.wants_stop():
                yield None
                return
            time.sleep(_POLL_SECONDS)

    def stream(
        self, begin: Callable[[], tuple[T, _core.Generation]], caller: _Caller
    ) -> tuple[T, StreamedGeneration] | None:
        """Starts a generation that runs as its reader asks for more, without a turn.

        Args, returns and raises: as started().
        """
        with self.started(begin, caller, nullcontext()) as started:
            if started is None:
                return None
            stream = StreamedGeneration(started[1], self)
            with self._lock:
                self._streams.add(stream)
            return started[0], stream


@dataclass(frozen=True)
class _NoVerification:
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    dense_passes: int = 0


@dataclass(frozen=True, kw_only=True)
class _NothingDone:
    """The account of a sequence that was stopped before it began, as SequenceResult."""

    prompt_tokens: int
    token_ids: tuple[int, ...] = ()
    finish_reason: str = "abort"
    error: str = ""
    cached_tokens: int = 0
    time_to_first_token_s: float = 0.0
    decode_s: float = 0.0
    verification: _NoVerification = _NoVerification()


class UnstartedGeneration:
    """A generation whose caller had enough before there was room for it."""

    done = True
    prefill_progress = (0, 0)

    def __init__(self, requests: Sequence[_Request]) -> None:
        self._results = [_NothingDone(prompt_tokens=len(r.prompt_ids)) for r in requests]

    def advance(self) -> list[tuple[int, int]]:
        """Nothing comes."""
        return []

    def stop(self, sequence: int, reason: str = "stop") -> None:
        """Does nothing: it is over."""

    def results(self) -> list[Any]:
        """One for each prompt, aborted."""
        return [*self._results]

    def close(self) -> None:
        """Does nothing: it holds nothing."""
