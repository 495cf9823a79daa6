"""A conversation that stays in the cache: each turn reads only what is new.

Made by Decoder.session(). The engine's side, and what exactly stays, is Session in
cpp/include/tidal/decoder.h.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from tidaldecode import _core
from tidaldecode.batch import (
    Callbacks,
    PrefillProgress,
    Request,
    ShouldStop,
    make_request,
    run_generation,
)
from tidaldecode.call_lock import CallLock
from tidaldecode.closing import Closing
from tidaldecode.errors import InvalidArgument, UnsupportedError
from tidaldecode.results import GenerationResult
from tidaldecode.sampling import SamplingSettings, check_integer
from tidaldecode.stream import TextStream
from tidaldecode.text.frontend import Frontend, Messages, Prompt, split_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tidaldecode.sampling import SamplingOptions


@dataclass(frozen=True)
class SessionHost:
    """What sessions need of their decoder."""

    core: _core.Decoder
    frontend: Frontend
    holders: weakref.WeakSet[Any]  # of pages; they end with the decoder


class Session(Closing):
    """Tokens that stay in the cache from one turn to the next.

    Example:
        >>> with decoder.session() as session:
        ...     session.append(report)
        ...     print(session.generate("Question: who wrote this? Answer:").text)
        ...     print(session.generate("Question: and when? Answer:").text)

    What a turn generated belongs to the conversation, stop tokens and the tokens of stop strings
    included. A text that is not the first gets nothing (no BOS, no space)
    put in front of it. Between turns a
    session holds KV pages for its tokens, and no batch row. One turn runs at a time; what does not
    fit is a CapacityError and leaves the session as it was.
    """

    def __init__(self, core: _core.Session, host: SessionHost) -> None:
        """Takes over a session of the engine; Decoder.session and fork() make these."""
        self._core: _core.Session | None = core
        self._host: SessionHost | None = host
        self._stream: weakref.ref[TextStream] | None = None  # the newest
        self._turn = CallLock()  # of calls that run a turn to its end, or begin one
        host.holders.add(self)

    # The conversation

    @property
    def token_ids(self) -> list[int]:
        """All tokens so far, prompts and answers.

        Raises: InvalidArgument while a turn runs.
        """
        return self._open()[0].token_ids()

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def max_seq_len(self) -> int:
        """Most tokens the session may grow to."""
        return self._open()[0].max_seq_len

    def append(
        self,
        prompt: Prompt,
        *,
        add_special_tokens: bool = True,
        on_prefill: PrefillProgress | None = None,
        should_stop: ShouldStop | None = None,
    ) -> bool:
        """Adds a text or token ids and reads them, without generating.

        Args:
            prompt: what follows the tokens so far.
            add_special_tokens: False puts nothing (no BOS) around a text that is the first.
            on_prefill: called with (tokens done, tokens in all) while it is read. The last token is
                read by the next turn.
            should_stop: asked before every chunk; True ends the reading.

        Returns: False if should_stop ended it. Then, and if anything else does (Ctrl-C), the
            session is as before.
        Raises: InvalidArgument, CapacityError.
        """
        callbacks = Callbacks(on_prefill, should_stop)
        with self._turn:
            core, _ = self._open()
            generation = core.append(self._encode(prompt, add_special_tokens) or [])
            try:
                while not generation.done:
                    if callbacks.wants_stop():
                        return False
                    generation.advance()
                    callbacks.report(*generation.prefill_progress)
                    self._open()  # a callback may have closed it
            finally:
                generation.close()
        return True

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on.

        Raises: InvalidArgument.
        """
        core, _ = self._open()
        core.truncate(check_integer("length", length, low=0))

    def fork(self) -> Session:
        """A session of its own with the same tokens.

        Takes no pages: those of the tokens so far are shared until one of the sessions writes to
        them, which needs a page for each.

        Raises: InvalidArgument while a turn runs.
        """
        core, host = self._open()
        return Session(core.fork(), host)

    # Turns

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        add_special_tokens: bool = True,
        on_prefill: PrefillProgress | None = None,
        should_stop: ShouldStop | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> GenerationResult:
        """Adds a prompt, if there is one, and generates after all tokens so far.

        Without a prompt after a turn that generated, decoding goes on as if that had not ended.

        Args:
            prompt: a text or token ids.
            add_special_tokens: as in append().
            on_prefill: called with (tokens done, tokens in all) while the prompt is read.
            should_stop: as in Decoder.generate().
            sampling: the settings of Decoder.generate().

        A turn that is stopped (should_stop, Ctrl-C) while its prompt is being read leaves the
        session as it was; stopped later, the prompt and what was generated stay, until truncate().

        Raises: as Decoder.generate().
        """
        with self._turn:
            ids = self._encode(prompt, add_special_tokens)
            return self._run(ids, Callbacks(on_prefill, should_stop), sampling)

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        add_special_tokens: bool = True,
        on_prefill: PrefillProgress | None = None,
        should_stop: ShouldStop | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> TextStream:
        """generate(), as pieces of text while they come.

        The turn runs, and any other is refused, until the stream has ended or is closed.
        """
        with self._turn:  # until it runs
            ids = self._encode(prompt, add_special_tokens)
            return self._run_stream(ids, Callbacks(on_prefill, should_stop), sampling)

    def chat(
        self,
        messages: Messages,
        *,
        on_prefill: PrefillProgress | None = None,
        should_stop: ShouldStop | None = None,
        **options: Any,
    ) -> GenerationResult:
        """The answer to a whole conversation, through the folder's chat template.

        The session becomes this conversation: what it begins with that is in the cache already is
        not read again (GenerationResult.cached_tokens), anything else is forgotten. If a turn is
        stopped while it reads, the session keeps that beginning.

        Args:
            messages: {"role": "user", "content": "..."} each, from the first one on.
            on_prefill: as in generate().
            should_stop: as in generate().
            options: the settings of Decoder.generate() and the options of Decoder.render_chat().

        Raises: ConfigError if the folder has no chat template; else as Decoder.generate().
        """
        sampling, chat = split_options(options)
        ids = self._open()[1].frontend.render_one_chat(messages, **chat)
        with self._turn:
            return self._run(ids, Callbacks(on_prefill, should_stop), sampling, is_whole=True)

    def chat_stream(
        self,
        messages: Messages,
        *,
        on_prefill: PrefillProgress | None = None,
        should_stop: ShouldStop | None = None,
        **options: Any,
    ) -> TextStream:
        """chat(), as pieces of text while they come."""
        sampling, chat = split_options(options)
        ids = self._open()[1].frontend.render_one_chat(messages, **chat)
        with self._turn:
            return self._run_stream(
                ids, Callbacks(on_prefill, should_stop), sampling, is_whole=True
            )

    # Lifetime

    def close(self) -> None:
        """Ends a running stream and gives the pages back. Any later use is an error."""
        core, stream = self._core, self._stream() if self._stream is not None else None
        self._core = self._host = self._stream = None
        if stream is not None:
            stream.close()
        if core is not None:
            core.close()

    def __repr__(self) -> str:
        if self._core is None:
            return "Session(closed)"
        try:
            return f"Session({len(self)} of {self.max_seq_len} tokens)"
        except UnsupportedError:
            return "Session(of another process)"
        except InvalidArgument:
            return "Session(a turn is running)"

    # Inner parts

    def _encode(self, prompt: Prompt | None, add_special_tokens: bool) -> list[int] | None:
        """Token ids of a turn's prompt; a text that follows tokens gets nothing in front."""
        core, host = self._open()
        if prompt is None:
            return None
        follows = len(core.token_ids()) > 0
        return host.frontend.encode_prompt(
            prompt, follows=follows, add_special_tokens=add_special_tokens
        )

    def _open(self) -> tuple[_core.Session, SessionHost]:
        core, host = self._core, self._host
        if core is None or host is None:
            raise InvalidArgument("session: it is closed; start a new one")
        return core, host

    def _run(
        self,
        prompt: list[int] | None,
        callbacks: Callbacks,
        sampling: SamplingOptions,
        is_whole: bool = False,
    ) -> GenerationResult:
        _, host = self._open()
        settings = host.frontend.check_sampling(**sampling)
        make_text = host.frontend.text_maker(settings, needed=False)
        request, generation = self._start(prompt, settings, is_whole)
        return run_generation(generation, [request], make_text, callbacks)[0]

    def _run_stream(
        self,
        prompt: list[int] | None,
        callbacks: Callbacks,
        sampling: SamplingOptions,
        is_whole: bool = False,
    ) -> TextStream:
        _, host = self._open()
        settings = host.frontend.check_sampling(**sampling)
        make_text = host.frontend.text_maker(settings, needed=True)
        request, generation = self._start(prompt, settings, is_whole)
        stream = TextStream(generation, request, make_text([request.prompt_ids]), callbacks)
        self._stream = weakref.ref(stream)
        host.holders.add(stream)
        return stream

    def _start(
        self, prompt: list[int] | None, settings: SamplingSettings, is_whole: bool
    ) -> tuple[Request, _core.Generation]:
        """Starts a turn; is_whole: the prompt takes the place of the session's tokens."""
        core, host = self._open()
        guide = host.frontend.guided_call(settings, host.core)
        tokens = core.token_ids()
        ids = prompt or []
        keep = len(tokens)
        if is_whole:
            keep = min(_common_length(tokens, ids), len(ids) - 1)  # the last is always read
            tokens, ids = tokens[:keep], ids[keep:]
        room = core.most_tokens(keep, bool(ids))
        request = make_request(tokens + ids, settings, room, guide)
        return request, core.start(ids, request.core_params(), keep)


def _common_length(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))
