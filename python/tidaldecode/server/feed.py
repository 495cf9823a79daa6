"""From the engine's thread to the event loop: what has come of all answers is taken at once.

The engine lines up who has news in an inbox and writes to one eventfd at the end of a pass; the
loop watches that. Nobody else is looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from tidaldecode import _core
from tidaldecode.errors import TidalError
from tidaldecode.server.answer import Answer
from tidaldecode.text.detokenizer import push_all


class Feed:
    """All answers that are being made."""

    def __init__(self, loop: asyncio.AbstractEventLoop, core: _core.Decoder) -> None:
        """Listens to an engine within a loop, in whose thread all methods are called."""
        self._loop = loop
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._inbox = core.open_inbox(self._fd)
        self._answers: dict[int, Answer] = {}  # by the keys that the inbox has
        self._keys = itertools.count()
        self._ender = ThreadPoolExecutor(1, thread_name_prefix="ender")
        loop.add_reader(self._fd, self._on_news)

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def answers(self) -> list[Answer]:
        """Those that have not ended."""
        return list(self._answers.values())

    def add(self, answer: Answer) -> None:
        """Hears an answer from now on until it has ended."""
        answer.key = next(self._keys)
        self._answers[answer.key] = answer
        if not self._inbox.add(answer.generation, answer.key):
            self._read(answer)

    def cancel(self, answers: Iterable[Answer]) -> None:
        """Ends answers at the next end of a pass; each delivers its end, as any other."""
        for answer in answers:
            if not answer.has_ended:
                self._end(answer, "abort")

    def hold(self, answers: Iterable[Answer]) -> None:
        """Leaves in the engine what comes of answers, until they are resumed."""
        for answer in answers:
            if not (answer.has_ended or answer.is_ending):
                answer.is_held = True
                self._inbox.remove(answer.generation)

    def resume(self, answers: Iterable[Answer]) -> None:
        """Hears answers again that were held, and what has come of them meanwhile."""
        for answer in answers:
            if answer.is_held:
                answer.is_held = False
                self._inbox.add(answer.generation, answer.key)

    async def close(self) -> None:
        """Ends everything."""
        self.cancel(self.answers)
        await asyncio.to_thread(self._ender.shutdown)
        self._loop.remove_reader(self._fd)
        for answer in self.answers:
            self._read(answer)
            self._forget(answer)
        self._inbox.close()
        os.close(self._fd)

    def _on_news(self) -> None:
        os.eventfd_read(self._fd)
        letters = [
            (answer, token_ids, has_more)
            for key, token_ids, has_more in self._inbox.take()
            if (answer := self._answers.get(key)) is not None and not answer.is_ending
        ]
        texts = iter(_texts_of([(answer, ids) for answer, ids, _ in letters if ids]))
        for answer, token_ids, has_more in letters:
            if token_ids:
                answer.hear(token_ids, next(texts))
            elif not has_more:
                answer.hear(token_ids)
            if answer.is_matched or answer.has_ended:
                self._settle(answer)  # what comes behind a stop string is not wanted
            elif has_more:
                self._read(answer)

    def _read(self, answer: Answer) -> None:
        """Takes what has come of one answer, and its end."""
        if answer.is_held:
            return
        answer.read()
        self._settle(answer)

    def _settle(self, answer: Answer) -> None:
        """Does what follows from an answer's newest tokens."""
        if answer.has_ended:
            self._forget(answer)
            if not answer.generation.done:  # its text has failed, and the engine does not know
                self._ender.submit(answer.generation.stop, 0, "abort")
        elif answer.is_matched:
            self._end(answer, "stop")

    def _end(self, answer: Answer, reason: str) -> None:
        """Lets the ender's thread end an answer, for that waits for the pass under way."""
        if not answer.is_ending:
            answer.is_ending, answer.is_held = True, False
            self._inbox.remove(answer.generation)
            self._ender.submit(self._stop, answer, reason)

    def _stop(self, answer: Answer, reason: str) -> None:
        try:
            answer.generation.stop(0, reason)
        finally:
            self._loop.call_soon_threadsafe(self._read, answer)

    def _forget(self, answer: Answer) -> None:
        if self._answers.pop(answer.key, None) is not None:
            self._inbox.remove(answer.generation)


def _texts_of(news: list[tuple[Answer, list[int]]]) -> list[str | None]:
    """What new tokens add to the text of each answer; None for an answer that must see itself."""
    calls = [(answer.assembler, ids) for answer, ids in news if answer.assembler is not None]
    if len(calls) == len(news):
        # Who breaks the tokenizer by a token of its own must not take the others along.
        with contextlib.suppress(TidalError):
            return [*push_all(calls)]
    return [None] * len(news)
