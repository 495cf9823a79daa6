"""The command line's options: those of several commands, and those made from the settings.

An option of the engine is a field of DecodeConfig with help in config.OPTION_HELP. Used by the
commands; `with_options` gives them groups of options.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import GenericAlias, UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from tidaldecode import _core
from tidaldecode.config import INT_RANGES, OPTION_HELP, DecodeConfig
from tidaldecode.errors import InvalidArgument, show


def default_words(value: Any) -> str:
    """What help says of a default that is not the option's own."""
    return f" [dim]\\[default: {value}][/dim]"


ModelDir = Annotated[
    Path, typer.Argument(help="A Hugging Face model folder, or a hub id: org/name\\[@revision].")
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default=False)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")]
PromptFile = Annotated[
    str | None, typer.Option(help="A file with the text to continue; - is stdin.")
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Put prompts through the model's chat template."
        + default_words("if the folder has one"),
    ),
]

# Where and in what a model runs.
PLACE = (
    "device", "dtype", "kv_dtype", "weight_format", "lm_head_format", "activation_format",
)  # fmt: skip
# What a command that decodes one sequence has no use for.
_OF_SERVERS = (
    "load_format", "max_batch_size", "num_pages", "prefix_cache", "max_chunk_ms", "decode_share",
)  # fmt: skip
ONE_SEQUENCE = tuple(name for name in OPTION_HELP if name not in _OF_SERVERS)

_HINTS = get_type_hints(DecodeConfig)
_DEFAULTS = _core.DecodeConfig()
# Settings whose defaults are nothing, or in the words of their help.
_UNSAID = ("select_layers", "scored_layers", "recent_tokens", "sparse_min_context", "verify")
# Options whose names are not simply the setting's.
_NAMES = {
    "prefix_cache": ("--prefix-cache/--no-prefix-cache",),
    "web": ("--web/--no-web",),
    "max_new_tokens": ("--max-new-tokens", "-n"),
}

Command = Callable[..., None]
Options = Sequence[Parameter]


def with_options(**groups: Options) -> Callable[[Command], Command]:
    """Gives a command options in place of its parameters of these names.

    In each the command gets a dict: the options that are given, by name.
    """

    def decorate(command: Command) -> Command:
        declared = signature(command, eval_str=True).parameters.values()
        shown = [
            option.replace(kind=Parameter.KEYWORD_ONLY)
            for parameter in declared
            for option in groups.get(parameter.name, [parameter])
        ]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            own = {p.name: values[p.name] for p in declared if p.name not in groups}
            command(**own, **{name: _given(options, values) for name, options in groups.items()})

        run.__signature__ = Signature(shown)  # type: ignore[attr-defined]
        run.__annotations__ = {option.name: option.annotation for option in shown}
        return run

    return decorate


def _given(options: Options, values: dict[str, Any]) -> dict[str, Any]:
    given = {o.name: values[o.name] for o in options if values[o.name] not in (None, [])}
    return {n: _PARSERS[n](v, _dashed(n)) if n in _PARSERS else v for n, v in given.items()}


def make_option(name: str, kind: Any, words: str, panel: str, default: Any = None) -> Parameter:
    """An option of a command; one that may be repeated has its setting's name in the singular."""
    names = _NAMES.get(name, ("--" + _dashed(name),))
    if get_origin(kind) is list:
        names = (names[0].removesuffix("s"),)
    return Parameter(
        name,
        Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[
            kind | None if default is None else kind,
            typer.Option(
                *names, help=words, rich_help_panel=panel, show_default=default is not None
            ),
        ],
    )


def engine_options(*names: str, **defaults: Any) -> Options:
    """Options for settings of the engine; `defaults` are the command's own."""
    return [_engine_option(n, defaults.get(n, getattr(DecodeConfig, n))) for n in names]


def _engine_option(name: str, default: Any) -> Parameter:
    words = OPTION_HELP[name]
    if default is None and name not in _UNSAID:
        value = getattr(_DEFAULTS, name)
        if value == 0 and name in INT_RANGES and INT_RANGES[name][0] > 0:
            value = "automatic"
        words += default_words("yes" if value is True else value)
    kind = str if name in _PARSERS else kind_of(_HINTS[name])
    return make_option(name, kind, words, "Engine", default)


def kind_of(hint: Any) -> Any:
    """The type of a setting's option: the first of a union, a list for a tuple."""
    if isinstance(hint, UnionType):
        hint = get_args(hint)[0]
    return GenericAlias(list, get_args(hint)[:1]) if get_origin(hint) is tuple else hint


def parse_layers(text: str, name: str) -> tuple[int, ...]:
    """ "2,13" as (2, 13).

    Raises: InvalidArgument for anything else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidArgument(
            f"{name}: got {show(text)}, expected layer numbers such as 2,13"
        ) from None


def _parse_count(text: str, name: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise InvalidArgument(f"{name}: got {show(text)}, expected an integer or auto") from None


def _dashed(name: str) -> str:
    return name.replace("_", "-")


# Settings that are texts on the command line, and what reads them.
_PARSERS: dict[str, Callable[[str, str], Any]] = {
    "token_budget": _parse_count,
    "recent_tokens": _parse_count,
    "sparse_min_context": _parse_count,
    "draft_tokens": _parse_count,
    "select_layers": parse_layers,
    "scored_layers": parse_layers,
}
SAMPLING = [
    make_option(name, kind, words, "Sampling")
    for name, kind, words in (
        ("max_new_tokens", int, "Most tokens to generate."),
        ("temperature", float, "0 is greedy."),
        ("top_k", int, "Keep the k most likely tokens; 0 is off."),
        ("top_p", float, "Keep tokens up to this probability."),
        ("min_p", float, "Drop tokens below this share of the best."),
        ("repetition_penalty", float, "1 is off."),
        ("seed", int, "Of the draws; a new one each time if not given."),
        ("stop", list[str], "Text that ends the output; may be repeated."),
        ("stop_token_ids", list[int], "Token id that ends the output; may be repeated."),
        ("ignore_eos", bool, "Go on after end-of-text tokens."),
    )
]
