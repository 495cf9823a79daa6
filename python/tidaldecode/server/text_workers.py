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


class TextWorkers:
    """Threads with a tokenizer each."""

    def __init__(self, folder: ModelFolder) -> None:
        """Starts a tokenizer for each thread; a folder without one that works gives none.

        Raises: OutOfMemoryError if a process cannot be started.
        """
        self._own = threading.local()
        self._problem: TidalError | None = None
        self._tokenizers: list[Tokenizer] = []
        self._free: list[Tokenizer] = []
        try:
            for _ in range(NUM_WORKERS):
                self._tokenizers.append(Tokenizer(folder.path, folder.model.vocab_size))
        except ConfigError as problem:
            self._problem = problem
        self._free += self._tokenizers
        self._pool = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="text")

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the thread that asks, which is one of the workers.

        Raises: ConfigError if the folder has none that can be used.
        """
        if self._problem is not None:
            raise type(self._problem)(str(self._problem)) from self._problem
        if not hasattr(self._own, "tokenizer"):
            self._own.tokenizer = self._free.pop()
        return self._own.tokenizer

    @property
    def chat_template(self) -> str | None:
        """The template that conversations with tools go through."""
        return self._tokenizers[0].chat_template if self._tokenizers else None

    @property
    def special_tokens(self) -> frozenset[str]:
        """Tokens that decoding leaves out, as they are written."""
        return self._tokenizers[0].special_tokens if self._tokenizers else frozenset()

    def run(self, work: Callable[[], T]) -> Future[T]:
        """Does the work in the next free thread."""
        return self._pool.submit(work)

    def close(self) -> None:
        """Ends the processes; work that still waits is not done."""
        for tokenizer in self._tokenizers:
            tokenizer.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
