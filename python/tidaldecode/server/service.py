"""The model behind the server, from its loading to its end, and who is being answered.

A service is "loading", "ready", "draining" (told to end: nobody new is let in) or "dead" (it could
not load, or its engine has failed). Everything but the loading happens in the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tidaldecode.decoder import Decoder
from tidaldecode.errors import BackendError, InvalidArgument
from tidaldecode.requests import Request
from tidaldecode.server.answer_parts import AnswerForm, find_form
from tidaldecode.server.errors import ApiError, api_error, took_too_long, unavailable
from tidaldecode.server.exchange import Exchange
from tidaldecode.server.feed import Feed
from tidaldecode.server.metrics import Metrics
from tidaldecode.server.settings import ServeConfig
from tidaldecode.server.text_workers import TextWorkers

_logger = logging.getLogger("tidaldecode")

LoadProgress = Callable[[int, int], None]
T = TypeVar("T")

_TICK_S = 0.25
_READING_FACTOR = 10  # times step_timeout_s that a pass may take while prompts are read
SAID = {
    "loading": "the model is being loaded",
    "draining": "the server is about to end",
    "engine_dead": "the engine has failed; the server is about to end",
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is served, as long as it is."""

    decoder: Decoder
    texts: TextWorkers
    form: AnswerForm  # of chats
    loaded_at: int  # seconds since the epoch

    @property
    def most_tokens(self) -> int:
        """The most tokens of one sequence, prompt and answer."""
        config = self.decoder.config
        assert config.max_seq_len and config.num_pages and config.page_size  # numbers while in use
        return min(config.max_seq_len, config.num_pages * config.page_size)


class Service:
    """What all routes share."""

    def __init__(self, load: Callable[[LoadProgress], Decoder], settings: ServeConfig) -> None:
        """Prepares to load a model.

        Args:
            load: makes the decoder, in a thread of its own; told how many bytes of how many.
            settings: of the server.
        """
        self.settings = settings
        self.state = "loading"
        self.progress = (0, 0)  # bytes of the weights read, of all
        self.problem: BaseException | None = None  # why it is dead
        self.exchanges: set[Exchange] = set()
        self.metrics = Metrics(self)
        self.names: tuple[str, ...] = settings.served_model_names
        self.num_preparing = 0  # requests whose prompts are being made
        self.feed: Feed  # once the model is there
        self.loop: asyncio.AbstractEventLoop
        self.on_change: Callable[[], None] = lambda: None  # called when the state has changed
        # Closes the connections of clients that have not read for too long, at a time; how many.
        self.drop_slow_clients: Callable[[float], int] = lambda _: 0
        self._load = load
        self._model: Model | None = None
        self._engine_at = (-1, 0.0)  # passes so far, and when that was seen first
        self._ticking: asyncio.Task[None] | None = None
        self._loading: asyncio.Task[None] | None = None

    # Its life

    def start(self) -> None:
        """Begins to load, and to look after time limits."""
        self.loop = asyncio.get_running_loop()
        self._ticking = self.loop.create_task(self._tick_on())
        self._loading = self.loop.create_task(self._load_model())

    async def _load_model(self) -> None:
        def load() -> Model:
            decoder = self._load(self._on_progress)
            texts = TextWorkers(decoder.folder)
            form = find_form(texts, self.settings)
            return Model(decoder=decoder, texts=texts, form=form, loaded_at=int(time.time()))

        try:
            self._model = await asyncio.to_thread(load)
        except Exception as problem:
            self.die(problem)
            return
        self.feed = Feed(self.loop, self._model.decoder._open_core())
        if not self.names:
            self.names = (self._model.decoder.folder.path.resolve().name,)
        if self.state == "loading":
            self.state = "ready"
        self.on_change()

    def _on_progress(self, done: int, total: int) -> None:
        self.progress = (done, total)

    def drain(self) -> None:
        """Lets nobody in from now on."""
        if self.state in ("loading", "ready"):
            self.state = "draining"
            self.on_change()

    def die(self, problem: BaseException) -> None:
        """Says that nothing more will come of the engine."""
        if self.state == "dead":
            return
        self.state = "dead"
        self.problem = problem
        if self._model is not None:
            _logger.error("server: the engine has failed: %s", problem)
        for exchange in list(self.exchanges):
            exchange.fail(self.refusal())
        self.on_change()

    def abort(self) -> None:
        """Ends whoever is still answered."""
        for exchange in list(self.exchanges):
            exchange.fail(unavailable("draining", "the server has been ended"))

    def forsake(self) -> None:
        """Does nothing: all there is ends with the process."""

    async def close(self) -> None:
        """Ends everything and frees the model."""
        if self._ticking is not None:
            self._ticking.cancel()
        if self._loading is not None:
            await self._loading  # it cannot be interrupted
        if self._model is not None and self.state != "dead":
            await self.feed.close()
        model, self._model = self._model, None
        if model is not None:
            model.texts.close()
            if self.state != "dead":
                await asyncio.to_thread(model.decoder.close)

    # Who is let in

    def refusal(self) -> ApiError:
        """What is said to whom the state keeps out."""
        code = "engine_dead" if self.state == "dead" else self.state
        return unavailable(code, SAID[code], retry_after_s=5)

    @property
    def model(self) -> Model:
        """What is served.

        Raises: ApiError unless the service is ready.
        """
        if self.state != "ready" or self._model is None:
            raise self.refusal()
        return self._model

    @property
    def loaded(self) -> Model | None:
        """What is served, in any state once it is there."""
        return self._model

    def in_words(self) -> str:
        """What is served, and how, once it is there."""
        model = self._model
        assert model is not None
        decoder = model.decoder
        memory = decoder.memory_plan().total_bytes / 2**30
        return (
            f"{', '.join(self.names)} on {decoder.config.device}: plan {decoder.plan} "
            f"({decoder.plan_source}), {memory:.2f} GiB, {decoder.config.max_batch_size} rows of "
            f"up to {model.most_tokens:,} tokens"
        )

    def check_room(self, num_answers: int) -> None:
        """Whether so many answers more may wait in line.

        Raises: ApiError.
        """
        stats = self.model.decoder.stats()
        most = self.settings.max_queued_requests
        waiting = stats["num_waiting"] + self.num_preparing
        if num_answers > most:
            raise ApiError(
                400, "invalid_value",
                f"n: got {num_answers} answers in one request, expected at most {most} "
                "(max_queued_requests)", "n",
            )  # fmt: skip
        if waiting + num_answers > most and waiting > 0:
            self.metrics.rejected("queue_full")
            running = stats["num_decoding"] + stats["num_reading"]
            wait = min(120, max(1, waiting // max(1, running)))
            raise unavailable("queue_full", f"{waiting} requests wait already", wait)

    def check_tokens(self, num_tokens: int) -> None:
        """Whether the line has room for so many tokens of prompts more. A text worker may ask.

        Raises: ApiError.
        """
        most = self.settings.max_queued_tokens
        if most is None:
            return
        in_line = [answer for answer in self.feed.answers if not answer.has_begun]
        waiting = sum(len(answer.prompt_ids) for answer in in_line)
        if waiting and waiting + num_tokens > most:
            self.metrics.rejected("queue_full")
            raise unavailable("queue_full", f"{waiting} tokens of prompts wait already", 5)

    async def prepare(self, work: Callable[[], list[Request]], like: int) -> list[Request]:
        """Lets a text worker make requests; if nobody waits for them any more, they are ended.

        Args:
            work: makes them.
            like: as for TextWorkers.run().

        Raises: ApiError for whatever the work raises.
        """
        texts = self.model.texts
        self.num_preparing += 1
        future = asyncio.wrap_future(texts.run(work, like))
        future.add_done_callback(self._one_less)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._end_unwanted)
            raise
        except Exception as error:
            raise self.to_api_error(error) from error

    def _one_less(self, _: object) -> None:
        self.num_preparing -= 1

    def _end_unwanted(self, future: asyncio.Future[list[Request]]) -> None:
        if not future.cancelled() and future.exception() is None:
            for request in future.result():
                self.loop.run_in_executor(None, request.cancel)

    async def in_text_worker(self, work: Callable[[], T]) -> T:
        """What the work gives, done by a text worker.

        Raises: ApiError for whatever it raises.
        """
        try:
            return await asyncio.wrap_future(self.model.texts.run(work))
        except Exception as error:
            raise self.to_api_error(error) from error

    def to_api_error(self, error: BaseException) -> ApiError:
        """What a client is told of an error."""
        if self._model is None or (isinstance(error, InvalidArgument) and self.state != "ready"):
            return self.refusal() if self.state != "ready" else api_error(error)
        return api_error(error, {str(self._model.decoder.folder.path): "the model"})

    def hear_error(self, error: Exception) -> None:
        """Looks whether an answer's error is the end of them all."""
        if isinstance(error, BackendError):
            self.die(error)

    # Time limits

    async def _tick_on(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._tick(time.monotonic())

    def _tick(self, now: float) -> None:
        settings = self.settings
        for exchange in list(self.exchanges):
            age = now - exchange.began_at
            if settings.request_timeout_s and age > settings.request_timeout_s:
                exchange.fail(took_too_long(age))
            elif settings.queue_timeout_s and age > settings.queue_timeout_s and exchange.waits:
                self.metrics.rejected("queue_timeout")
                exchange.fail(unavailable("queue_timeout", f"no row was free for {age:.0f} s", 30))
            else:
                exchange.tick(now)
        self.metrics.slow_clients(self.drop_slow_clients(now))
        self._watch_engine(now)

    def _watch_engine(self, now: float) -> None:
        model = self._model
        if model is None or self.state == "dead" or not self.settings.step_timeout_s:
            return
        stats = model.decoder.stats()
        passes = stats["num_steps"] + stats["num_chunks"] + stats["num_finished"]
        is_busy = stats["num_decoding"] - stats["num_unread"] + stats["num_reading"] > 0
        if passes != self._engine_at[0] or not is_busy:
            self._engine_at = (passes, now)
            return
        seconds = now - self._engine_at[1]
        # A pass over a long prompt takes what it takes, on a CPU minutes.
        factor = _READING_FACTOR if stats["num_reading"] else 1
        if seconds > self.settings.step_timeout_s * factor:
            self.die(BackendError(f"engine: no pass has ended for {seconds:.0f} s"))
