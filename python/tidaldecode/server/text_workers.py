"""Two threads for what takes long with texts: templates, tokenising, and the submitting after it.

Each has a text process of its own (text/text_process.py), so that a long prompt holds up neither
the next one nor the texts of answers, which the decoder's own process makes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.errors import ConfigError, TidalError
from tidaldecode.text.tokenizer import Tokenizer

NUM_WORKERS = 2

T = TypeVar("T")


class _Worker:
    """A thread, with its tokenizer if there is one."""

    def __init__(self) -> None:
        self.tokenizer: Tokenizer | None = None
        self.num_waiting = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="text")

    def run(self, work: Callable[[], T], own: threading.local) -> Future[T]:
        """Does the work, for which `own` has the worker."""

        def do() -> T:
            own.worker = self
            return work()

        self.num_waiting += 1
        future = self._pool.submit(do)
        future.add_done_callback(self._one_less)
        return future

    def _one_less(self, _: object) -> None:
        self.num_waiting -= 1

    def close(self) -> None:
        if self.tokenizer is not None:
            self.tokenizer.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


class TextWorkers:
    """Threads with a tokenizer each."""

    def __init__(self, folder: ModelFolder) -> None:
        """Starts a tokenizer for each thread; a folder without one that works gives none.

        Raises: OutOfMemoryError if a process cannot be started.
        """
        self._own = threading.local()
        self._problem: TidalError | None = None
        self._workers = [_Worker() for _ in range(NUM_WORKERS)]
        try:
            for worker in self._workers:
                worker.tokenizer = Tokenizer(folder.path, folder.model.vocab_size)
        except ConfigError as problem:
            self._problem = problem

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the thread that asks, which is one of the workers.

        Raises: ConfigError if the folder has none that can be used.
        """
        if self._problem is not None:
            raise type(self._problem)(str(self._problem)) from self._problem
        tokenizer: Tokenizer = self._own.worker.tokenizer
        return tokenizer

    @property
    def chat_template(self) -> str | None:
        """The template that conversations with tools go through."""
        tokenizer = self._workers[0].tokenizer
        return None if tokenizer is None else tokenizer.chat_template

    @property
    def special_tokens(self) -> frozenset[str]:
        """Tokens that decoding leaves out, as they are written."""
        tokenizer = self._workers[0].tokenizer
        return frozenset() if tokenizer is None else tokenizer.special_tokens

    @property
    def named_tokens(self) -> dict[str, str] | None:
        """Special tokens by their names ("bos_token"); None without a tokenizer."""
        tokenizer = self._workers[0].tokenizer
        return None if tokenizer is None else tokenizer.named_tokens

    def run(self, work: Callable[[], T], like: int = 0) -> Future[T]:
        """Does the work in the thread with the least to do.

        Args:
            work: what to do.
            like: of equally free threads, equal numbers get the same one, whose tokenizer knows the
                texts that came with this number before (text/worker/known_texts.py).
        """
        first = like % NUM_WORKERS
        order = self._workers[first:] + self._workers[:first]
        return min(order, key=lambda worker: worker.num_waiting).run(work, self._own)

    def close(self) -> None:
        """Ends the processes; work that still waits is not done."""
        for worker in self._workers:
            worker.close()
