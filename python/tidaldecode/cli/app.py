"""The command line: tidaldecode generate, chat, serve, info, demo, calibrate and eval.

A command imports what it needs when it runs, for importing takes longer than opening a small model.
Text goes to stdout; progress, notes and errors go to stderr. Exit codes: 0 done, 1 something failed
while running, 2 bad usage or bad input, 3 no plan good enough (calibrate), 130 interrupted.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tidaldecode import _core
from tidaldecode.checkpoint.model_folder import (
    at_revision,
    demo_model_dir,
    read_model_folder,
)
from tidaldecode.cli import options as opt
from tidaldecode.cli.terminal import (
    Bars,
    NoteHandler,
    drop_unsaid,
    is_watched,
    one_line,
    print_error,
    say,
    without_line_break,
)
from tidaldecode.decoder import Decoder
from tidaldecode.errors import (
    BackendError,
    InvalidArgument,
    OutOfMemoryError,
    TidalError,
    UnsupportedError,
)
from tidaldecode.memory_plan import plan_memory
from tidaldecode.results import GenerationResult

# What typer raises for wrong usage; older versions take it from click, newer bring their own.
_USAGE_ERROR = typer.BadParameter.__mro__[2]
assert hasattr(_USAGE_ERROR, "format_message")

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

# Commands that live in rooms of their own: name -> module and function.
_ROOMS = {
    "chat": ("tidaldecode.cli.chat", "chat"),
    "calibrate": ("tidaldecode.calibration.command", "calibrate"),
    "eval": ("tidaldecode.evaluation.command", "evaluate"),
    "serve": ("tidaldecode.server.command", "serve"),
}


class _Commands(TyperGroup):
    """The commands; those of other rooms are imported when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *_ROOMS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _ROOMS:
            return super().get_command(ctx, cmd_name)
        module, function = _ROOMS[cmd_name]
        room = typer.Typer(add_completion=False, rich_markup_mode="rich")
        room.command(name=cmd_name)(getattr(importlib.import_module(module), function))
        return typer.main.get_command(room)


app = typer.Typer(
    name="tidaldecode",
    cls=_Commands,
    help="Long-context decoding with position persistent sparse attention (TidalDecode).",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"tidaldecode {_core.version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


# What the memory that a model takes depends on.
_OF_MEMORY = (
    *opt.PLACE, "attention", "token_budget", "select_layers", "scored_layers", "shadow", "verify",
    "drafts", "draft_tokens", "max_seq_len", "max_batch_size", "page_size", "num_pages",
    "gpu_memory_utilization", "prefill_chunk",
)  # fmt: skip
_OF_DEMO = (
    "device", "dtype", "select_layers", "scored_layers", "token_budget", "top_p_mass",
    "min_token_budget", "num_threads",
)  # fmt: skip

_Prompt = Annotated[str | None, typer.Argument(help="The text to continue; - reads it from stdin.")]
_AsChat = Annotated[
    bool, typer.Option("--chat", help="Put the text through the model's chat template.")
]


@app.command()
@opt.with_options(engine=opt.engine_options(*opt.ONE_SEQUENCE), sampling=opt.SAMPLING)
def generate(
    model_dir: opt.ModelDir,
    *,
    prompt: _Prompt = None,
    prompt_file: opt.PromptFile = None,
    chat: _AsChat = False,
    system: Annotated[str | None, typer.Option(help="A system message, with --chat.")] = None,
    revision: opt.Revision = None,
    engine: dict[str, Any],
    sampling: dict[str, Any],
    debug: opt.Debug = False,
) -> None:
    """Continue a text; the output streams to stdout."""
    if system is not None and not chat:
        raise InvalidArgument("system: got a system message without --chat, expected both")
    text, bars = _read_prompt(prompt, prompt_file), Bars(is_watched())
    model = at_revision(model_dir, revision)
    with bars.loading(f"Loading {model_dir.name}") as on_load:
        # One sequence: a cache for more would only take memory.
        decoder = Decoder(model, **engine, max_batch_size=1, progress=on_load)
    with decoder:
        result = _stream_text(decoder, text, chat, system, sampling, bars)
        if is_watched():
            _print_summary(decoder, result)
    if result.error is not None:
        raise TidalError(result.error)


@app.command()
@opt.with_options(engine=opt.engine_options(*_OF_MEMORY))
def info(
    *,
    model_dir: Annotated[
        Path | None, typer.Argument(help="A model folder or hub id to describe as well.")
    ] = None,
    revision: opt.Revision = None,
    engine: dict[str, Any],
    debug: opt.Debug = False,
) -> None:
    """Show version, devices and libraries; with a folder, what it holds and the memory that it
    would take with the settings given. Loads nothing."""
    from rich.console import Console

    from tidaldecode.cli.info import show_installation, show_memory, show_model

    console = Console(highlight=False, markup=False)
    if model_dir is not None:
        max_seq_len = engine.get("max_seq_len")
        folder = read_model_folder(at_revision(model_dir, revision), max_seq_len=max_seq_len)
        folder.log_notes(max_seq_len)
        show_model(console, folder)
        try:
            show_memory(console, plan_memory(folder.path, **engine))
        except (BackendError, UnsupportedError) as error:  # of this device only
            console.print(f"Memory: {one_line(str(error))}", markup=False)
    show_installation(console)


@app.command()
@opt.with_options(engine=opt.engine_options(*_OF_DEMO))
def demo(
    *,
    model: Annotated[
        Path | None, typer.Option(help="Any model folder instead of the embedded model.")
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(help="Prompt length in tokens; may be repeated.")
    ] = None,
    engine: dict[str, Any],
    seed: Annotated[
        int | None, typer.Option(help="Of text and key; new ones each time if not given.")
    ] = None,
    debug: opt.Debug = False,
) -> None:
    """Hide a key in a long text and ask for it, densely and with a plan, side by side."""
    from rich.console import Console

    from tidaldecode.cli.demo import DEFAULT_CONTEXTS, run_demo
    from tidaldecode.cli.demo_view import show_comparison

    model_dir = model or demo_model_dir()
    contexts = tuple(context or DEFAULT_CONTEXTS)
    console = Console(highlight=False)
    bars = Bars(is_watched())
    comparisons = run_demo(model_dir, contexts, bars, seed=seed, **engine)
    for index, comparison in enumerate(comparisons):
        if index == 0:
            console.print(f"Model: {one_line(str(model_dir))}", soft_wrap=True, markup=False)
        show_comparison(console, comparison)


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt from wherever the user put it; one line break at its end is the editor's."""
    if (prompt is None) == (prompt_file is None):
        found = "neither" if prompt is None else "both"
        raise InvalidArgument(f"prompt: got {found}, expected a PROMPT or --prompt-file")
    source = prompt if prompt is not None else prompt_file
    if source == "-":
        name, data = "stdin", sys.stdin.buffer.read()
    elif prompt is not None:
        return prompt
    else:
        name = str(prompt_file)
        try:
            data = Path(name).read_bytes()
        except OSError as cause:
            raise InvalidArgument(f"prompt-file: {name}: {cause.strerror}") from cause
    try:
        return without_line_break(data.decode("utf-8"))
    except UnicodeDecodeError as cause:
        raise InvalidArgument(f"prompt: {name} is not UTF-8 (byte {cause.start})") from cause


def _stream_text(
    decoder: Decoder,
    text: str,
    chat: bool,
    system: str | None,
    sampling: dict[str, Any],
    bars: Bars,
) -> GenerationResult:
    """Writes the continuation to stdout while it comes."""
    prompt: Any = text
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        prompt = decoder.render_chat([*messages, {"role": "user", "content": text}])
    with (
        bars.reading("Reading the prompt") as on_prefill,
        decoder.stream(prompt, on_prefill=on_prefill, **sampling) as stream,
    ):
        try:
            for piece in stream:
                sys.stdout.write(piece)
                sys.stdout.flush()
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()
    assert stream.result is not None
    return stream.result


def _print_summary(decoder: Decoder, result: GenerationResult) -> None:
    timings, checks = result.timings, result.verification
    kept = f", {checks.tokens_per_dense_pass:.1f} tokens per dense pass" if checks else ""
    say(
        f"[{result.prompt_tokens} + {len(result.token_ids)} tokens, "
        f"first after {timings.time_to_first_token_s:.2f} s, "
        f"then {timings.decode_tokens_per_s:.1f} tokens/s{kept}; {decoder.config.device}, "
        f"plan {decoder.plan}; {result.finish_reason}]"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code. The console script and python -m call this."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    handler = NoteHandler()
    logger = logging.getLogger("tidaldecode")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        return _run(arguments)
    except BaseException as error:
        if "--debug" in arguments:
            say(traceback.format_exc())
        return _explain(error)
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
        drop_unsaid()


def _run(arguments: list[str]) -> int:
    # Where a shell has closed one: nothing comes, and nobody reads.
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115, for as long as it runs
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    # Whatever the locale, text the terminal cannot show must not end the program.
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="replace")
    code = app(args=arguments, prog_name="tidaldecode", standalone_mode=False)
    if code == EXIT_INTERRUPTED:  # typer has caught it
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _explain(error: BaseException) -> int:
    """Says what went wrong in one line and chooses the exit code."""
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        print_error("interrupted")
        return EXIT_INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # The reader has gone (| head): nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    if isinstance(error, _USAGE_ERROR):
        print_error(error.format_message())  # type: ignore[attr-defined]
        return EXIT_BAD_INPUT
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_FAILED
    failed = (BackendError, OutOfMemoryError)
    if isinstance(error, TidalError):
        print_error(str(error))
        is_plain = type(error) is TidalError
        return EXIT_FAILED if is_plain or isinstance(error, failed) else EXIT_BAD_INPUT
    print_error(f"{type(error).__name__}: {error}; run again with --debug for the traceback")
    return EXIT_FAILED
