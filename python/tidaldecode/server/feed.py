"""From the engine's thread to the event loop: who has news is read, and nobody else is looked at.

Every answer has an eventfd that the engine writes to at the end of a pass. All of them are in one
epoll set, edge triggered, so that a counter is never read; the loop watches the set itself.
"""

from __future__ import annotations

import asyncio
import os
import select
from concurrent.futures import ThreadPoolExecutor

from tidaldecode.server.answer import Answer


class Feed:
    """All answers that are being made."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Listens within a loop, in whose thread all methods are called."""
        self._loop = loop
        self._epoll = select.epoll()
        self._answers: dict[int, Answer] = {}  # by descriptor
        self._ender = ThreadPoolExecutor(1, thread_name_prefix="ender")
        loop.add_reader(self._epoll.fileno(), self._on_news)

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def answers(self) -> list[Answer]:
        """Those that have not ended."""
        return list(self._answers.values())

    def add(self, answer: Answer) -> None:
        """Hears an answer from now on until it has ended."""
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._answers[fd] = answer
        answer.fd = fd
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLET)
        if not answer.generation.notify_at(fd):
            self._read(fd, answer)

    def cancel(self, answers: list[Answer]) -> None:
        """Ends answers at the next end of a pass; each delivers its end, as any other."""
        for answer in answers:
            answer.is_held = False
            if not answer.has_ended:
                self._ender.submit(self._stop, answer, "abort")

    def resume(self, answers: list[Answer]) -> None:
        """Reads what has come meanwhile of answers that were held."""
        for answer in answers:
            if answer.is_held:
                answer.is_held = False
                self._read(answer.fd, answer)

    async def close(self) -> None:
        """Ends everything."""
        self.cancel(self.answers)
        await asyncio.to_thread(self._ender.shutdown)
        self._loop.remove_reader(self._epoll.fileno())
        for fd, answer in list(self._answers.items()):
            self._read(fd, answer)
            self._forget(fd)
        self._epoll.close()

    def _on_news(self) -> None:
        answers = self._answers
        for fd, _ in self._epoll.poll(0):
            answer = answers.get(fd)
            if answer is not None:
                self._read(fd, answer)

    def _read(self, fd: int, answer: Answer) -> None:
        was_stopping = answer.is_stopping
        answer.read()
        if answer.has_ended:
            self._forget(fd)
        elif answer.is_stopping and not was_stopping:
            self._ender.submit(self._stop, answer, "stop")

    def _stop(self, answer: Answer, reason: str) -> None:
        """Ends an answer when the pass under way has ended; in the ender's thread."""
        answer.generation.stop(0, reason)
        # The engine says nothing of one that had ended by itself meanwhile.
        self._loop.call_soon_threadsafe(self._on_stopped, answer)

    def _on_stopped(self, answer: Answer) -> None:
        if self._answers.get(answer.fd) is answer:
            self._read(answer.fd, answer)

    def _forget(self, fd: int) -> None:
        answer = self._answers.pop(fd, None)
        if answer is None:
            return
        answer.generation.forget_fd(fd)
        os.close(fd)
