"""One HTTP request that waits for answers, and what they have said that it has not read yet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tidaldecode.server.answer import Answer, Delta
from tidaldecode.server.asking import MOST_UNREAD
from tidaldecode.server.errors import ApiError

if TYPE_CHECKING:
    from tidaldecode.requests import Request
    from tidaldecode.server.selection import SelectionWatch
    from tidaldecode.server.service import Service


class Exchange:
    """The answers to one HTTP request, in the event loop's thread."""

    def __init__(self, service: Service) -> None:
        """Opens it; leave it with close()."""
        self.began_at = time.monotonic()
        self.answers: list[Answer] = []
        self.failure: ApiError | None = None
        self.num_ended = 0
        self.watch: SelectionWatch | None = None  # of what its answers read
        # Takes what comes while somebody waits for news, or says that it must wait in line.
        self.take_at_once: Callable[[Delta], bool] = lambda _: False
        self._heard_at = self.began_at
        self.service = service
        self._deltas: list[Delta] = []
        self._num_unread = 0  # tokens of those
        self._waiter: asyncio.Future[None] | None = None
        service.exchanges.add(self)

    def ask(self, requests: Sequence[Request], *, wants_logprobs: bool) -> None:
        """Begins to hear requests that have been submitted."""
        for request in requests:
            answer = Answer(request, len(self.answers), self._deliver)
            answer.wants_logprobs = wants_logprobs
            self.answers.append(answer)
            self.service.feed.add(answer)
        if self.failure is not None:
            self.service.feed.cancel(self.answers)

    @property
    def has_ended(self) -> bool:
        """Whether all answers have, and all is known that was to be told of them."""
        if self.watch is not None and self.watch.is_reading:
            return False
        return self.num_ended == len(self.answers)

    @property
    def has_news(self) -> bool:
        """Whether there is something that has not been taken."""
        return bool(self._deltas)

    @property
    def waits(self) -> bool:
        """Whether it waits for its first row, with none of its prompts begun."""
        return all(not each.token_ids and each.status == "waiting" for each in self.answers)

    async def news(self) -> list[Delta]:
        """What has come since the last time; waits for something, or for a poke.

        Raises: ApiError once the exchange has failed.
        """
        if not self._deltas and self.failure is None:
            self._waiter = self.service.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self.failure is not None:
            raise self.failure
        deltas, self._deltas = self._deltas, []
        was_full, self._num_unread = self._num_unread >= MOST_UNREAD, 0
        self._heard_at = time.monotonic()
        if was_full:
            self.service.feed.resume(self.answers)
        return deltas

    def poke(self) -> None:
        """Lets who waits for news look around."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def tick(self, now: float) -> None:
        """Lets a stream that has been silent for long say that it is alive."""
        keep_alive = self.service.settings.sse_keep_alive_s
        if keep_alive and now - self._heard_at > keep_alive:
            self.poke()

    def leave(self) -> None:
        """Ends it because its client has gone."""
        self.service.metrics.client_gone()
        self.fail(ApiError(408, "client_gone", "the client has closed its connection"))

    def fail(self, error: ApiError) -> None:
        """Ends it for a reason that its client is told."""
        if self.failure is None:
            self.failure = error
        self.service.feed.cancel(self.answers)
        self.poke()

    def close(self) -> None:
        """Leaves it; answers that have not ended are cancelled."""
        self.service.feed.cancel(self.answers)
        self.service.exchanges.discard(self)

    def _deliver(self, delta: Delta) -> None:
        answer = self.answers[delta.index]
        if delta.result is not None or delta.error is not None:
            self.num_ended += 1
        if delta.error is not None:
            self.service.hear_error(delta.error)
        self.service.metrics.hear(answer, delta)
        if self.watch is not None:
            self.watch.hear(answer, delta)
        self.tell(delta)

    def tell(self, delta: Delta) -> None:
        """Adds to the news, unless it is taken at once."""
        if self._waiter is not None and not self._waiter.done() and self.take_at_once(delta):
            self._heard_at = time.monotonic()
            if self.has_ended:  # there is nothing to wait for any more
                self.poke()
            return
        self._deltas.append(delta)
        self._num_unread += len(delta.token_ids or ())
        if self._num_unread >= MOST_UNREAD and self.failure is None:
            self.service.feed.hold(self.answers)
        self.poke()
