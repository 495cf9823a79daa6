"""tidaldecode chat: a conversation with a model, typed at a terminal or piped through.

The whole conversation goes to a session at every turn, which reads only what it does not have in
its cache (session.py). Answers go to stdout and nothing else does, but for the prompt's sign where
a person types.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tidaldecode.batch import PrefillProgress, ShouldStop
from tidaldecode.checkpoint.model_folder import at_revision
from tidaldecode.cli import options as opt
from tidaldecode.cli.terminal import (
    Bars,
    is_watched,
    print_error,
    print_note,
    say,
    without_line_break,
)
from tidaldecode.decoder import Decoder
from tidaldecode.errors import CapacityError, InvalidArgument, TidalError, show
from tidaldecode.results import GenerationResult
from tidaldecode.session import Session
from tidaldecode.text.harmony import HarmonyReader, writes_harmony
from tidaldecode.user_cache import replace_file

_SIGN, _MORE_SIGN = "> ", ". "
_CONTINUED = "\\"  # at the end of a line: the message goes on in the next one
_HELP = """\
/reset      forget the conversation, keep the system message
/save FILE  write the messages to a JSON file
/help       show this
/exit       leave; so do Ctrl-D, and Ctrl-C at an empty prompt

A backslash at the end of a line continues the message in the next one. A message that begins
with a slash is typed with two. Ctrl-C stops an answer; what there is of it stays."""


@opt.with_options(engine=opt.engine_options(*opt.ONE_SEQUENCE), sampling=opt.SAMPLING)
def chat(
    model_dir: opt.ModelDir,
    *,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    revision: opt.Revision = None,
    engine: dict[str, Any],
    sampling: dict[str, Any],
    debug: opt.Debug = False,
) -> None:
    """Talk with a model in the terminal; /help shows what can be typed.

    Piped, every line of stdin is a message and every answer a text on stdout."""
    bars, model = Bars(is_watched()), at_revision(model_dir, revision)
    with bars.loading(f"Loading {model_dir.name}") as on_load:
        # One sequence: a cache for more would only take memory.
        decoder = Decoder(model, **engine, max_batch_size=1, progress=on_load)
    with decoder:
        conversation = _Conversation(decoder, system, sampling)
        if sys.stdin.isatty() and sys.stdout.isatty():
            _talk(conversation, decoder, bars)
        else:
            _answer_all(conversation, bars)


class _Answer:
    """An answer that is written to stdout while it comes."""

    def __init__(self, channels: HarmonyReader | None) -> None:
        """Begins one; channels: what tells its reasoning, which is written but no content."""
        self.content = ""
        self._channels = channels
        self._is_reasoning = False

    def add(self, piece: str) -> None:
        """Writes a piece of the model's text."""
        if self._channels is None:
            self.content += piece
            sys.stdout.write(piece)
        else:
            self._channels.push(piece)
            self._write_events(self._channels)
        sys.stdout.flush()

    def finish(self) -> None:
        """Writes what is left, and ends the line."""
        if self._channels is not None:
            self._channels.finish()
            self._write_events(self._channels)
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _write_events(self, channels: HarmonyReader) -> None:
        for event in channels.take_events():
            is_reasoning = event.kind == "reasoning"
            if self._is_reasoning and not is_reasoning:
                sys.stdout.write("\n\n")
            self._is_reasoning = is_reasoning
            sys.stdout.write(event.text)
            self.content += "" if is_reasoning else event.text


class _Conversation:
    """The messages so far, and the session that has them in its cache."""

    def __init__(self, decoder: Decoder, system: str | None, sampling: dict[str, Any]) -> None:
        """Tries the template and the settings before the first message is written.

        Raises: ConfigError if the model cannot chat; InvalidArgument for a wrong setting;
            CapacityError if not even a short message fits.
        """
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._sampling = sampling
        self._has_channels = writes_harmony(decoder._frontend.tokenizer.chat_template)
        if self._has_channels:
            self._sampling = sampling | {"skip_special_tokens": False}
        self._session: Session = decoder.session()
        self.messages: list[dict[str, str]] = [*self._system]
        shortest = [*self._system, {"role": "user", "content": "?"}]
        self._session.chat_stream(shortest, **self._sampling).close()  # nothing is read

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages = [*self._system]
        self._session.truncate(0)

    def answer(
        self, text: str, on_prefill: PrefillProgress, should_stop: ShouldStop | None
    ) -> GenerationResult:
        """Writes the answer to a message to stdout while it comes.

        The message and its answer then belong to the conversation, an answer that was stopped
        included; without any answer the conversation is as before.

        Raises: CapacityError if there is no room left; TidalError.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            stream = self._session.chat_stream(
                asked, on_prefill=on_prefill, should_stop=should_stop, **self._sampling
            )
        except CapacityError as cause:
            raise CapacityError(
                f"the conversation has no room left for this: {cause}; "
                "/reset starts a new one, --max-seq-len gives it more room"
            ) from cause
        answer = _Answer(HarmonyReader(()) if self._has_channels else None)
        with stream:
            try:
                for piece in stream:
                    answer.add(piece)
            finally:
                answer.finish()
        result = stream.result
        assert result is not None
        if result.error is not None:
            raise TidalError(result.error)
        if result.token_ids:
            self.messages = [*asked, {"role": "assistant", "content": answer.content}]
        if result.prompt_tokens + len(result.token_ids) >= self._session.max_seq_len:
            print_note(
                f"the context of {self._session.max_seq_len} tokens is full; /reset starts a new "
                "conversation, --max-seq-len gives it more room"
            )
        return result

    def save(self, name: str) -> Path:
        """Writes the messages as JSON, the whole file or nothing.

        Raises: InvalidArgument if the file cannot be written.
        """
        if not name:
            raise InvalidArgument("/save: got no file name, expected /save FILE")
        text = json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n"
        try:
            path = Path(name).expanduser()
            replace_file(path, text)
        except (OSError, ValueError, RuntimeError) as cause:  # the last two: what is no file name
            reason = getattr(cause, "strerror", None) or cause
            raise InvalidArgument(f"/save: {show(name)}: {reason}") from cause
        return path


# At a terminal


def _talk(conversation: _Conversation, decoder: Decoder, bars: Bars) -> None:
    """Answers what is typed until the person leaves; errors are shown, and it goes on."""
    console = Console(stderr=True, highlight=False)

    def show_dim(text: str) -> None:
        console.print(text, style="dim", markup=False, soft_wrap=True)

    show_dim(f"[{decoder.config.device}, plan {decoder.plan}; /help shows what can be typed]")
    for text in _joined(_typed_lines()):
        try:
            if _is_message(text):
                with bars.reading("Reading") as on_prefill, _ctrl_c_stops() as should_stop:
                    result = conversation.answer(_unescaped(text), on_prefill, should_stop)
                show_dim(_summary(result))
            elif not _run_command(conversation, text):
                return
        except TidalError as error:
            print_error(str(error))


def _typed_lines() -> Iterator[str | None]:
    """Lines as they are typed; None: what was typed before is dropped."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() a history and editing
    # What is no text is an error of its message, not the end of the conversation.
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    line = ""
    while True:
        is_continued = line.endswith(_CONTINUED)
        try:
            line = input(_MORE_SIGN if is_continued else _SIGN)
            yield line
        except EOFError:
            print()
            yield None
            return
        except KeyboardInterrupt:
            print()
            if not is_continued and not _half_typed():
                return
            line = ""
            yield None


def _half_typed() -> str:
    """What stands at the prompt; nothing where there is no readline to ask."""
    readline = sys.modules.get("readline")
    return readline.get_line_buffer() if readline is not None else ""


@contextlib.contextmanager
def _ctrl_c_stops() -> Iterator[Callable[[], bool]]:
    """Makes the first Ctrl-C a wish to stop, which the function tells; a second one interrupts."""
    is_stopped = threading.Event()

    def stop(*_: object) -> None:
        is_stopped.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield is_stopped.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def _summary(result: GenerationResult) -> str:
    num_read = result.prompt_tokens - result.cached_tokens
    ends = {"length": "; cut at the limit", "abort": "; stopped"}
    return (
        f"[{result.cached_tokens} tokens cached, {num_read} read, {len(result.token_ids)} new, "
        f"{result.timings.decode_tokens_per_s:.1f} tokens/s{ends.get(result.finish_reason, '')}]"
    )


# Piped


def _answer_all(conversation: _Conversation, bars: Bars) -> None:
    """Answers every line of stdin; the first error ends it."""
    for text in _joined(_piped_lines()):
        if _is_message(text):
            with bars.reading("Reading") as on_prefill:
                conversation.answer(_unescaped(text), on_prefill, None)
        elif not _run_command(conversation, text):
            return


def _piped_lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield without_line_break(line.decode("utf-8"))
        except UnicodeDecodeError as cause:
            raise InvalidArgument(
                f"stdin: line {number} is not UTF-8 (byte {cause.start})"
            ) from cause


# Messages and commands


def _joined(lines: Iterable[str | None]) -> Iterator[str]:
    """Messages out of lines: continued ones are joined, empty ones left out."""
    parts: list[str] = []
    for line in lines:
        if line is None:
            parts = []
            continue
        parts.append(line.removesuffix(_CONTINUED))
        if line.endswith(_CONTINUED):
            continue
        text, parts = "\n".join(parts), []
        if text.strip():
            yield text
    if parts:
        yield "\n".join(parts)


def _is_message(text: str) -> bool:
    return not text.startswith("/") or text.startswith("//")


def _unescaped(text: str) -> str:
    return text.removeprefix("/") if text.startswith("//") else text


def _run_command(conversation: _Conversation, text: str) -> bool:
    """Does what a line with a slash asks for; False: to leave.

    Raises: InvalidArgument for a command that there is not, or that fails.
    """
    name, _, argument = text.strip().partition(" ")
    if name == "/exit":
        return False
    if name == "/help":
        say(_HELP)
    elif name == "/reset":
        conversation.reset()
    elif name == "/save":
        print_note(f"saved to {conversation.save(argument.strip())}")
    else:
        raise InvalidArgument(
            f"{show(name)}: there is no such command; /help shows what there is, a message that "
            "begins with a slash is typed with two"
        )
    return True
