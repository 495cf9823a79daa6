"""A request: a prompt on its way to its answer, beside any number of others.

Made by Decoder.submit(). The engine advances it whether anybody waits for it or not; here it is
waited for, read piece by piece, by threads or by an event loop, or given up.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidaldecode.config import DecodeConfig, PlanConfig, check_setting
from tidaldecode.engine_config import core_plan
from tidaldecode.errors import ConfigError, UnsupportedError
from tidaldecode.plans import choose_plan
from tidaldecode.results import GenerationResult, TokenLogprobs, token_logprobs
from tidaldecode.sampling import check_bool, check_integer, check_seconds
from tidaldecode.stream import TextStream
from tidaldecode.text.chat import check_text

if TYPE_CHECKING:
    from tidaldecode import _core
    from tidaldecode.checkpoint.model_folder import ModelFolder


MAX_CHOICES = 128  # answers to one prompt
# How long a call that is late still reads what has come: tokens may come as fast as they are read.
_READING_SECONDS = 0.1
_HOLDING_SECONDS = 0.01  # of an event loop, before its other tasks have their turn


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """What a request asks for beside its prompt and how it is drawn; None is as the decoder."""

    attention: str | None = None
    plan: PlanConfig | None = None
    verify: bool | None = None
    priority: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    cache_salt: str = ""
    max_unread: int | None = None

    def for_core(self, settings: DecodeConfig, folder: ModelFolder) -> dict[str, Any]:
        """The arguments of the engine's start().

        Raises: InvalidArgument, ConfigError.
        """
        options: dict[str, Any] = {
            "priority": check_integer("priority", self.priority, low=-(2**31)),
            "verify": self.verify,
            "cache_salt": check_text(self.cache_salt, "cache_salt"),
        }
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                options[name] = check_integer(name, count, low=0, high=20)
        if self.max_unread is not None:
            options["max_unread"] = check_integer("max_unread", self.max_unread, low=1)
        if self.verify is not None:
            check_bool("verify", self.verify)
        if self.attention is not None:
            check_setting("attention", self.attention)
        if self.plan is not None and not isinstance(self.plan, PlanConfig):
            raise ConfigError(f"plan: got a {type(self.plan).__name__}, expected a PlanConfig")
        if self.attention not in (None, "auto") or self.plan is not None:
            asked = settings if self.plan is None else self.plan
            options["plan"] = core_plan(choose_plan(asked, self.attention or "auto", folder))
        return options


class Request:
    """One answer to come.

    Example:
        >>> requests = [decoder.submit(question) for question in questions]
        >>> answers = [request.result().text for request in requests]

    Iterate over it, with `for` or `async for`, for pieces of text as they come; call result() or
    `await` it for the whole. Pieces that were read are not given again; the result has them all.
    With `n` above 1 these are of the first answer, and choices has all.
    Stop strings end the text when it is read.
    """

    def __init__(
        self, stream: TextStream, generation: _core.Generation, others: Sequence[Request] = ()
    ) -> None:
        """Takes over a stream and the generation that it reads, and the other answers to the
        prompt; Decoder.submit makes these."""
        self._stream = stream
        self._generation = generation
        self._others = tuple(others)

    @property
    def choices(self) -> tuple[Request, ...]:
        """The answers to the prompt, each a request of its own: this one, and those after it if
        `n` were asked for."""
        return (self, *self._others)

    @property
    def status(self) -> str:
        """Where it is: "waiting", "reading" (its prompt), "decoding", "paused" or "finished"."""
        return "finished" if self._stream.result is not None else self._generation.status(0)

    def result(self, timeout: float | None = None) -> GenerationResult:
        """The whole answer, once it has ended.

        Args:
            timeout: seconds to wait at most; None is for as long as it takes.

        Raises: TimeoutError, the request going on; else what Decoder.generate() does while it runs,
            each time that it is asked.
        """
        deadline = math.inf
        if timeout is not None:
            deadline = time.monotonic() + check_seconds("timeout", timeout)
        while self._stream.result is None:
            left, num_tokens = deadline - time.monotonic(), len(self._stream.token_ids)
            self._stream.read(min(max(left, 0.0), 0.1))
            is_late = left <= 0 and len(self._stream.token_ids) == num_tokens
            if (is_late or left < -_READING_SECONDS) and self._stream.result is None:
                raise TimeoutError(f"request: it is {self.status} after {timeout} s")
        return self._ended()

    @property
    def token_ids(self) -> list[int]:
        """The new tokens that have been read so far."""
        return list(self._stream.token_ids)

    def read(self, timeout: float) -> str:
        """The next piece of text, as TextStream.read()."""
        return self._stream.read(timeout)

    @property
    def prefill_progress(self) -> tuple[int, int]:
        """Tokens of the prompt that have been read, and that there are to read: without those that
        a session had; those that the prefix cache has count as read."""
        return self._generation.prefill_progress

    def new_logprobs(self, first: int) -> tuple[TokenLogprobs, ...]:
        """Those of the tokens from index `first` on that have been read so far; none unless they
        were asked for.

        Raises: InvalidArgument for what is no index.
        """
        first = check_integer("first", first, low=0)
        found = self._generation.logprobs(0, first)
        return token_logprobs(self._stream.token_ids[first : first + len(found)], found)

    def cancel(self) -> None:
        """Ends all its choices where they are (finish_reason "abort"), but for those that have
        ended."""
        for choice in self.choices:
            choice._stream.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)

    async def __aiter__(self) -> AsyncIterator[str]:
        bell: _Bell | None = None  # one for each that waits: its end is nobody else's
        began = time.monotonic()  # to have the loop for itself
        try:
            while True:
                if piece := self._stream.read(0.0):
                    yield piece
                elif self._stream.result is not None:
                    self._ended()
                    return
                else:
                    bell = bell or _Bell(self._generation)
                    await self._wait_for(bell.ring())
                    began = time.monotonic()
                if time.monotonic() - began > _HOLDING_SECONDS:
                    await self._wait_for(asyncio.sleep(0))
                    began = time.monotonic()
        finally:
            if bell is not None:
                bell.close()

    async def _wait_for(self, event: Awaitable[None]) -> None:
        """Waits. A task that is cancelled meanwhile cancels the request."""
        try:
            await event
        except asyncio.CancelledError:
            await asyncio.to_thread(self.cancel)
            raise

    def __await__(self) -> Generator[None, None, GenerationResult]:
        return self._finish().__await__()

    async def _finish(self) -> GenerationResult:
        async for _ in self:
            pass
        return self._ended()

    def _ended(self) -> GenerationResult:
        """The result, or what the request has failed with."""
        if self._stream.error is not None:
            raise self._stream.error
        assert self._stream.result is not None
        return self._stream.result

    def __repr__(self) -> str:
        try:
            return f"Request({self.status})"
        except UnsupportedError:
            return "Request(of another process)"


class _Bell:
    """Tells an event loop that the engine has news of a request, by an eventfd of its own."""

    def __init__(self, generation: _core.Generation) -> None:
        self._generation = generation
        self._loop = asyncio.get_running_loop()
        self._rings = asyncio.Event()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._loop.add_reader(self._fd, self._hear)
        if not generation.notify_at(self._fd):
            self._rings.set()

    def _hear(self) -> None:
        os.eventfd_read(self._fd)
        self._rings.set()

    async def ring(self) -> None:
        """Waits until there is something to read; others have a turn in any case."""
        if self._generation.has_news:
            await asyncio.sleep(0)
        while not self._generation.has_news:
            await self._rings.wait()
            self._rings.clear()

    def close(self) -> None:
        self._generation.forget_fd(self._fd)
        if not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
        os.close(self._fd)
