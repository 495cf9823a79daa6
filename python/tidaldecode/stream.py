"""Text while it is generated: one sequence, handed out token by token as it comes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tidaldecode import _core
from tidaldecode.batch import Callbacks, Request
from tidaldecode.call_lock import CallLock
from tidaldecode.closing import Closing
from tidaldecode.results import GenerationResult, make_result
from tidaldecode.sampling import check_seconds
from tidaldecode.text.detokenizer import TextAssembler


class TextStream(Iterator[str], Closing):
    """An iterator over the pieces of a text; `result` holds the whole once it has ended.

    Pieces never split a character and never hold part of a stop string; joined they are
    `result.text`. Closing the stream (or leaving its `with` block, or the interpreter dropping it)
    ends the sequence and frees its pages at once. Several threads may read one stream: each piece
    goes to one of them.
    """

    def __init__(
        self,
        generation: _core.Generation,
        request: Request,
        assembler: TextAssembler | None,  # None: token ids only
        callbacks: Callbacks,
    ) -> None:
        """Takes over a generation of one sequence; Decoder.stream and Session.stream make these."""
        self.result: GenerationResult | None = None
        self.error: Exception | None = None  # that the stream has ended with
        self.token_ids: list[int] = []  # the tokens so far
        self._prompt_ids = request.prompt_ids
        self._guide = request.guide
        self._stop_token_ids = frozenset(request.settings.stop_token_ids)
        self._assembler = assembler
        self._callbacks = callbacks
        self._pieces: list[str] = []
        self._lock = CallLock()  # held while a thread advances the generation or ends it
        self._is_closing = False
        self._generation: _core.Generation | None = generation

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        """The next piece of text; waits for as many tokens as it takes to have one."""
        while not self._is_closing and self._generation is not None:
            if piece := self.read(0.1):
                return piece
        raise StopIteration

    def read(self, timeout: float) -> str:
        """The next piece of text, if there is one in time; else an empty one.

        Once the text has ended, `result` is set. Whatever is raised while it runs ends the stream.

        Args:
            timeout: seconds to wait at most.

        Raises: InvalidArgument for what is no number of seconds; else as Decoder.generate().
        """
        timeout = check_seconds("timeout", timeout)
        try:
            with self._lock:  # who closes it has made the result by then
                if self._is_closing or self._generation is None:
                    return ""
                piece = self._advance(self._generation, timeout)
                self._pieces.append(piece)
                return piece
        except BaseException as error:
            if isinstance(error, Exception) and self.result is None:
                self.error = error
            self.close()
            raise

    def _advance(self, generation: _core.Generation, timeout: float) -> str:
        wants_stop = self._callbacks.wants_stop()
        if self._generation is None:  # a callback has closed the stream
            return ""
        if wants_stop:
            generation.stop(0, "abort")
        events = generation.advance(timeout)  # nothing once it is stopped
        if not self.token_ids and not self._callbacks.stopped:
            self._callbacks.report(*generation.prefill_progress)
        if self._generation is None:  # or the other one
            return ""
        tokens = [token_id for _, token_id in events]
        self.token_ids += tokens
        piece = ""
        if self._assembler is not None and not generation.done:
            piece = self._assembler.push(events).get(0, "")
            tokens = []
            if self._assembler.matched_stop(0) is not None:
                generation.stop(0, "stop")
        if generation.done:
            if self._assembler is not None:
                piece += self._assembler.finish({0: tokens}).get(0, "")
            self._end(piece)
        return piece

    def _end(self, last_piece: str) -> None:
        """Makes the result and frees the sequence; does nothing the second time."""
        generation, self._generation = self._generation, None
        if generation is None:
            return
        generation.close()
        self.result = self._result_of(generation.results()[0], [*self._pieces, last_piece])
        if self._callbacks.on_result is not None:
            self._callbacks.on_result(self.result)

    def _result_of(self, core: _core.SequenceResult, pieces: Iterable[str]) -> GenerationResult:
        """The result of a sequence that has ended, whose text came in these pieces."""
        assembler = self._assembler
        return make_result(
            core,
            prompt_ids=self._prompt_ids,
            text="".join(pieces) if assembler is not None else None,
            matched_stop=assembler.matched_stop(0) if assembler is not None else None,
            stop_token_ids=self._stop_token_ids,
            num_tokens=assembler.tokens_to_stop(0) if assembler is not None else None,
        )

    def close(self) -> None:
        """Ends the sequence where it is (finish_reason "abort") and frees its pages.

        Waits for the step that another thread runs; in a forked child, it does nothing.
        """
        if self._lock.is_foreign:
            self._generation = None
            return
        self._is_closing = True  # a thread that reads leaves the lock
        with self._lock:
            self._end("")

    def __del__(self) -> None:
        if getattr(self, "_generation", None) is not None:
            self.close()
