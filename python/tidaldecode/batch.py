"""The prompts of one call: fitted to the decoder, handed to the engine, and heard until they end.

The engine advances all calls together (cpp/src/engine/engine_loop.cc). Called by decoder.py and
session.py. stream.py is the one-sequence twin that hands text out while it comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidaldecode import _core
from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.errors import CapacityError
from tidaldecode.results import GenerationResult, make_result
from tidaldecode.sampling import SamplingSettings, check_callback
from tidaldecode.text.detokenizer import TextAssembler

if TYPE_CHECKING:
    from tidaldecode.text.guiding import GuidedCall

_logger = logging.getLogger("tidaldecode")

# What the engine calls by the same names.
_CORE_SETTINGS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "stop_token_ids", "min_new_tokens", "no_repeat_ngram_size", "logit_bias",
    "suppress_tokens", "bad_words", "allowed_token_ids",
)  # fmt: skip

MakeText = Callable[[Sequence[Sequence[int]]], TextAssembler]  # takes prompts' token ids
PrefillProgress = Callable[[int, int], None]
ShouldStop = Callable[[], bool]


@dataclass
class Callbacks:
    """What a caller wants to hear, and to say, while a call runs."""

    on_prefill: PrefillProgress | None
    should_stop: ShouldStop | None
    on_result: Callable[[GenerationResult], None] | None = None  # told when a stream ends
    stopped: bool = False  # should_stop has said so; it is not asked again
    _num_reported: int = 0

    def __post_init__(self) -> None:
        check_callback("on_prefill", self.on_prefill, 2)
        check_callback("should_stop", self.should_stop, 0)

    def wants_stop(self) -> bool:
        """Whether the caller has had enough."""
        if not self.stopped and self.should_stop is not None:
            self.stopped = bool(self.should_stop())
        return self.stopped

    def report(self, done: int, total: int) -> None:
        """Tells how much of the prompts has been read, if it is more than before."""
        if self.on_prefill is not None and done > self._num_reported:
            self._num_reported = done
            self.on_prefill(done, total)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how long its continuation may get."""

    prompt_ids: list[int]  # in a session all tokens before the new ones
    max_new_tokens: int
    settings: SamplingSettings
    guide: GuidedCall | None = None  # what it follows, which must live as long as it runs

    @property
    def num_tokens(self) -> int:
        """Positions to reserve."""
        return len(self.prompt_ids) + self.max_new_tokens

    def core_params(self) -> _core.SamplingParams:
        """The engine's form of the settings, with a seed of its own unless one was given."""
        params = _core.SamplingParams()
        params.max_new_tokens = self.max_new_tokens
        for name in _CORE_SETTINGS:
            setattr(params, name, getattr(self.settings, name))
        params.seed = self.settings.draw_seed()
        params.guide = 0 if self.guide is None else self.guide.key
        return params


def make_requests(
    prompts: Sequence[list[int]],
    settings: SamplingSettings,
    core: _core.Decoder,
    guide: GuidedCall | None = None,
) -> list[Request]:
    """Fits the prompts to the decoder, before any work is done.

    An explicit max_new_tokens must fit; a default one shrinks to the room behind the prompt.

    Raises: CapacityError naming need, have and the setting to change.
    """
    config = core.config
    most = min(config.max_seq_len, config.num_pages * config.page_size)
    requests = [make_request(prompt_ids, settings, most, guide) for prompt_ids in prompts]
    for index, request in enumerate(requests):
        if request.num_tokens > config.max_seq_len:
            raise CapacityError(
                f"prompt {index}: {len(request.prompt_ids)} prompt tokens + max_new_tokens "
                f"{request.max_new_tokens} need {request.num_tokens} positions, have max_seq_len "
                f"{config.max_seq_len}; raise max_seq_len as far as the model has positions, or "
                "shorten the prompt or max_new_tokens"
            )
        num_pages = -(-request.num_tokens // config.page_size)
        if num_pages > config.num_pages:
            raise CapacityError(
                f"prompt {index}: needs {num_pages} pages of {config.page_size} tokens, have "
                f"{config.num_pages}; raise num_pages or max_batch_size, or shorten the prompt or "
                "max_new_tokens"
            )
    return requests


def make_request(
    prompt_ids: list[int], settings: SamplingSettings, room: int, guide: GuidedCall | None = None
) -> Request:
    """A request where prompt and continuation have `room` positions together, if they fit."""
    max_new_tokens = settings.max_new_tokens
    if not settings.max_new_tokens_is_explicit:
        room = min(room, settings.max_length or room)
        max_new_tokens = max(1, min(max_new_tokens, room - len(prompt_ids)))
    return Request(
        prompt_ids=prompt_ids, max_new_tokens=max_new_tokens, settings=settings, guide=guide
    )


def note_other_rotation(requests: Sequence[Request], model: ModelConfig) -> None:
    """Says where answers may outgrow the window that their prompts chose the rotation for."""
    window = model.rope_window
    if window is None:
        return
    growing = [
        index
        for index, request in enumerate(requests)
        if len(request.prompt_ids) <= window < request.num_tokens
    ]
    if growing:
        request = requests[growing[0]]
        _logger.warning(
            "prompt %d%s: %d tokens choose the rotary frequencies (%s), those of up to %d tokens; "
            "the answer may grow beyond (max_new_tokens %d) and keeps them, so text there may be "
            "poor; session(max_seq_len=%d) has those of its whole length",
            growing[0],
            f" and {len(growing) - 1} more" if len(growing) > 1 else "",
            len(request.prompt_ids),
            model.rope.type,
            window,
            request.max_new_tokens,
            request.num_tokens,
        )


def start(requests: Sequence[Request], core: _core.Decoder, **options: Any) -> _core.Generation:
    """Hands requests to the engine, where they wait in line for rows and pages."""
    return core.start(
        [request.prompt_ids for request in requests],
        [request.core_params() for request in requests],
        **options,
    )


@contextmanager
def heard(
    generation: _core.Generation, on_prefill: PrefillProgress | None = None
) -> Iterator[_core.Generation]:
    """Hears a call without text to its end, for what it gives; it is closed behind the block."""
    callbacks = Callbacks(on_prefill, None)
    try:
        while not generation.done:
            generation.advance()
            callbacks.report(*generation.prefill_progress)
        yield generation
    finally:
        generation.close()


def run_generation(
    generation: _core.Generation,
    requests: Sequence[Request],
    make_text: MakeText | None,
    callbacks: Callbacks,
) -> list[GenerationResult]:
    """Hears a generation to its end; whatever happens, its pages come back.

    Args:
        generation: of the engine.
        requests: what it was started with.
        make_text: gives what turns token ids into text; None gives results without text.
        callbacks: of the caller.
    """
    settings = requests[0].settings
    texts = make_text([request.prompt_ids for request in requests]) if make_text else None

    def stop_if_wanted() -> None:
        if callbacks.wants_stop():
            generation.close()

    def on_tokens(events: list[tuple[int, int]]) -> None:
        callbacks.report(*generation.prefill_progress)
        if texts is not None and settings.stop:
            for sequence in texts.push(events):
                if texts.matched_stop(sequence) is not None:
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
    if texts is not None:
        # Without stop strings nobody has asked for text before: all of it is made at once.
        rest = [[] if settings.stop else result.token_ids for result in core_results]
        texts.finish(dict(enumerate(rest)))
    return [
        make_result(
            core_result,
            prompt_ids=requests[sequence].prompt_ids,
            text=texts.text(sequence) if texts is not None else None,
            matched_stop=texts.matched_stop(sequence) if texts is not None else None,
            stop_token_ids=settings.stop_token_ids,
        )
        for sequence, core_result in enumerate(core_results)
    ]
