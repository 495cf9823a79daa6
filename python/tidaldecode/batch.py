"""Running the prompts of one call: in waves of what fits, each wave in the engine's own loop.

Called by decoder.py and session.py. stream.py is the one-sequence twin that hands text out while it
runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tidaldecode import _core
from tidaldecode.errors import CapacityError, InvalidArgument, show
from tidaldecode.results import GenerationResult, make_result
from tidaldecode.sampling import SamplingSettings
from tidaldecode.text.detokenizer import TextAssembler

Decode = Callable[[Sequence[int]], str]
PrefillProgress = Callable[[int, int], None]
ShouldStop = Callable[[], bool]


@dataclass
class Callbacks:
    """What a caller wants to hear, and to say, while a call runs."""

    on_prefill: PrefillProgress | None
    should_stop: ShouldStop | None
    stopped: bool = False  # should_stop has said so; it is not asked again

    def __post_init__(self) -> None:
        for name in ("on_prefill", "should_stop"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise InvalidArgument(f"{name}: got {show(value)}, expected a function")

    def wants_stop(self) -> bool:
        """Whether the caller has had enough."""
        if not self.stopped and self.should_stop is not None:
            self.stopped = bool(self.should_stop())
        return self.stopped

    def report(self, done: int, total: int) -> None:
        """Tells how much of the prompts has been read."""
        if self.on_prefill is not None and total > 0:
            self.on_prefill(done, total)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how long its continuation may get."""

    prompt_ids: list[int]  # in a session all tokens before the new ones
    max_new_tokens: int
    settings: SamplingSettings

    @property
    def num_tokens(self) -> int:
        """Positions to reserve."""
        return len(self.prompt_ids) + self.max_new_tokens

    def core_params(self) -> _core.SamplingParams:
        """The engine's form of the settings, with a seed of its own unless one was given."""
        params = _core.SamplingParams()
        params.max_new_tokens = self.max_new_tokens
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            setattr(params, name, getattr(self.settings, name))
        params.seed = self.settings.draw_seed()
        params.stop_token_ids = list(self.settings.stop_token_ids)
        return params


def make_requests(
    prompts: Sequence[list[int]], settings: SamplingSettings, core: _core.Decoder
) -> list[Request]:
    """Fits the prompts to the decoder, before any work is done.

    An explicit max_new_tokens must fit; a default one shrinks to the room behind the prompt.

    Raises: CapacityError naming need, have and the setting to change.
    """
    config = core.config
    room = min(config.max_seq_len, config.num_pages * config.page_size)
    requests = []
    for prompt_ids in prompts:
        requests.append(make_request(prompt_ids, settings, room))
    num_free_pages = core.num_free_pages
    for index, request in enumerate(requests):
        if request.num_tokens > config.max_seq_len:
            raise CapacityError(
                f"prompt {index}: {len(request.prompt_ids)} prompt tokens + max_new_tokens "
                f"{request.max_new_tokens} need {request.num_tokens} positions, have max_seq_len "
                f"{config.max_seq_len}; raise max_seq_len, or shorten the prompt or max_new_tokens"
            )
        num_pages = _pages_for(request.num_tokens, config.page_size)
        if num_pages > num_free_pages:
            raise CapacityError(
                f"prompt {index}: needs {num_pages} pages of {config.page_size} tokens, have "
                f"{num_free_pages} free of {config.num_pages}; raise num_pages or max_batch_size, "
                "or shorten the prompt or max_new_tokens"
            )
    return requests


def make_request(prompt_ids: list[int], settings: SamplingSettings, room: int) -> Request:
    """A request where prompt and continuation have `room` positions together, if they fit."""
    max_new_tokens = settings.max_new_tokens
    if not settings.max_new_tokens_is_explicit:
        max_new_tokens = max(1, min(max_new_tokens, room - len(prompt_ids)))
    return Request(prompt_ids=prompt_ids, max_new_tokens=max_new_tokens, settings=settings)


def plan_waves(requests: Sequence[Request], core: _core.Decoder) -> Iterator[Sequence[Request]]:
    """Cuts the requests, in order, into runs that fit the rows and the pages free at that time."""
    config = core.config
    start = 0
    while start < len(requests):
        free = core.num_free_pages
        num_rows = max(1, core.num_free_rows)  # none free: let the engine say so
        end = start
        while end < len(requests) and end - start < num_rows:
            free -= _pages_for(requests[end].num_tokens, config.page_size)
            if free < 0 and end > start:
                break
            end += 1
        yield requests[start:end]
        start = end


def _pages_for(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)


@dataclass
class _Text:
    """The text of one sequence of a wave, assembled while it runs if it has stop strings."""

    assembler: TextAssembler
    pieces: list[str] = field(default_factory=list)

    def push(self, token_id: int) -> None:
        self.pieces.append(self.assembler.push(token_id))

    def finish(self) -> str:
        self.pieces.append(self.assembler.finish())
        return "".join(self.pieces)


def run_wave(
    core: _core.Decoder,
    requests: Sequence[Request],
    decode: Decode | None,
    callbacks: Callbacks,
) -> list[GenerationResult]:
    """Runs requests together to their ends.

    Args:
        core: the engine.
        requests: at most what the engine has rows and pages for.
        decode: text of token ids; None gives results without text.
        callbacks: of the caller.
    """
    generation = core.start(
        [request.prompt_ids for request in requests],
        [request.core_params() for request in requests],
    )
    return run_generation(generation, requests, decode, callbacks)


def run_generation(
    generation: _core.Generation,
    requests: Sequence[Request],
    decode: Decode | None,
    callbacks: Callbacks,
) -> list[GenerationResult]:
    """Runs a generation that has been started to its end; whatever happens, its pages come back."""
    settings = requests[0].settings
    texts = [
        _Text(TextAssembler(decode, request.prompt_ids, settings.stop)) if decode else None
        for request in requests
    ]
    is_reading = True

    def stop_if_wanted() -> None:
        if callbacks.wants_stop():
            for sequence in range(len(requests)):
                generation.stop(sequence, "abort")

    def on_tokens(events: list[tuple[int, int]]) -> None:
        nonlocal is_reading
        if is_reading:
            done, total = generation.prefill_progress
            callbacks.report(done, total)
            is_reading = done < total
        for sequence, token_id in events if settings.stop else ():
            text = texts[sequence]
            if text is None or token_id in settings.stop_token_ids:
                continue
            text.push(token_id)
            if text.assembler.matched_stop is not None:
                generation.stop(sequence, "stop")
        stop_if_wanted()

    is_watched = settings.stop or callbacks.on_prefill or callbacks.should_stop
    try:
        stop_if_wanted()
        while not generation.done:
            events = generation.advance()
            if is_watched:
                on_tokens(events)
        core_results = generation.results()
    finally:
        generation.close()
    return [
        _finish(core_result, text, settings)
        for core_result, text in zip(core_results, texts, strict=True)
    ]


def _finish(
    core_result: _core.SequenceResult, text: _Text | None, settings: SamplingSettings
) -> GenerationResult:
    if text is not None and not settings.stop:
        for token_id in core_result.token_ids:
            if token_id not in settings.stop_token_ids:
                text.push(token_id)
    return make_result(
        core_result,
        text=text.finish() if text is not None else None,
        matched_stop=text.assembler.matched_stop if text is not None else None,
        stop_token_ids=settings.stop_token_ids,
    )
