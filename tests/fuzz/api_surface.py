"""What can be called: every public name, found by looking and not by a list.

A class whose instances a caller holds needs an entry in RECEIVERS that makes one;
tests/python/test_fuzz.py fails where one is missing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import tidaldecode
from tidaldecode import DecodeConfig, Decoder
from tidaldecode.replay import Replay
from tidaldecode.sampling import SamplingOptions

# Returned by public calls, and public in all but the export.
_ALSO_PUBLIC = (Replay,)
_DUNDERS = ("__enter__", "__iter__", "__len__", "__next__", "__repr__", "__str__")
_TEMPLATE_OPTIONS = (
    "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
    "enable_thinking",
)  # fmt: skip
_PLANNING = set(tidaldecode.config.PLAN_SETTINGS) | {"attention", *tidaldecode.config.LAYER_FIELDS}
_PLANNING.add("correction_interval")


@dataclass(frozen=True)
class Receiver:
    """How to get an instance of a public class in each of its states."""

    states: tuple[str, ...]
    make: Callable[[Decoder, str], Any]


def _decoder(host: Decoder, state: str) -> Decoder:
    return host


def _session(host: Decoder, state: str) -> Any:
    session = host.session()
    if state != "empty":
        session.append([1, 2, 3])
    if state == "turn running":
        session.kept = session.stream("a", max_new_tokens=4)  # type: ignore[attr-defined]
    _close(host, session, state)
    return session


def _stream(host: Decoder, state: str) -> Any:
    stream = host.stream([1, 2, 3], max_new_tokens=4)
    if state == "ended":
        list(stream)
    _close(host, stream, state)
    return stream


def _request(host: Decoder, state: str) -> Any:
    request = host.submit([1, 2, 3], max_new_tokens=4)
    if state == "ended":
        request.result()
    if state == "cancelled":
        request.cancel()
    _close(host, request, state)
    return request


def _replay(host: Decoder, state: str) -> Any:
    replay = host.replay([[1, 2, 3], [4, 5]], max_new_tokens=4)
    _close(host, replay, state)
    return replay


def _close(host: Decoder, holder: Any, state: str) -> None:
    if state == "closed":
        holder.close()
    if state == "decoder closed":
        host.close()


def _result(host: Decoder, state: str) -> Any:
    return host.generate([1, 2, 3], max_new_tokens=2)


RECEIVERS = {
    "Decoder": Receiver(("tidal", "dense", "verify", "no text", "closed"), _decoder),
    "Session": Receiver(
        ("empty", "with tokens", "turn running", "closed", "decoder closed"), _session
    ),
    "TextStream": Receiver(("fresh", "ended", "closed", "decoder closed"), _stream),
    "Request": Receiver(("fresh", "ended", "cancelled", "decoder closed"), _request),
    "Replay": Receiver(("fresh", "closed", "decoder closed"), _replay),
    "GenerationResult": Receiver(("made",), _result),
    "Timings": Receiver(("made",), lambda host, state: _result(host, state).timings),
    "Guide": Receiver(("made",), lambda host, state: tidaldecode.Guide.regex("[ab]{2}")),
    "MemoryPlan": Receiver(("made",), lambda host, state: host.memory_plan()),
    "DecodeConfig": Receiver(("made",), lambda host, state: host.config),
    "PlanConfig": Receiver(("made",), lambda host, state: tidaldecode.PlanConfig()),
    "TokenLogprobs": Receiver(
        ("made",),
        lambda host, state: tidaldecode.TokenLogprobs(token_id=1, logprob=-1.0, rank=1, top=()),
    ),
    "Verification": Receiver(
        ("made",),
        lambda host, state: tidaldecode.Verification(
            drafted_tokens=3, accepted_tokens=2, dense_passes=1
        ),
    ),
}
# The first four are handed out by methods: their constructors take the engine's own objects. The
# others are plain values, which hold whatever they are given.
_NOT_CONSTRUCTED = (
    "Session", "TextStream", "Request", "Replay", "GenerationResult", "MemoryPlan", "Timings",
    "TokenLogprobs", "Verification",
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One thing to call."""

    name: str  # "Decoder.generate", "plan_memory"
    receiver: str  # class of the instance, or "" for functions and constructors
    attribute: str
    function: Callable[..., Any] | None  # None: a property

    def invoke(self, receiver: Any, arguments: dict[str, Any]) -> Any:
        """Makes the call; unknown names among the arguments are Python's to refuse."""
        if self.function is None:
            return getattr(receiver, self.attribute)
        return self.function(receiver, **arguments) if self.receiver else self.function(**arguments)


def public_classes() -> list[type]:
    """Classes of __all__ that are no errors, and those their calls return."""
    named = [getattr(tidaldecode, name) for name in tidaldecode.__all__]
    classes = [value for value in named if inspect.isclass(value)]
    return [c for c in classes if not issubclass(c, BaseException)] + [*_ALSO_PUBLIC]


@functools.lru_cache(maxsize=1)
def calls() -> tuple[Call, ...]:
    """Every public function, constructor, method and property, by name."""
    found = []
    for name in tidaldecode.__all__:
        value = getattr(tidaldecode, name)
        if inspect.isfunction(value):
            found.append(Call(name, "", name, value))
    for kind in public_classes():
        if kind.__name__ not in _NOT_CONSTRUCTED:
            found.append(Call(kind.__name__, "", kind.__name__, kind))
        if kind.__name__ in RECEIVERS:
            found += _members(kind)
    return tuple(sorted(found, key=lambda call: call.name))


def _members(kind: type) -> list[Call]:
    found = []
    for attribute, value in inspect.getmembers(kind):
        if attribute.startswith("_") and attribute not in _DUNDERS:
            continue
        name = f"{kind.__name__}.{attribute}"
        if isinstance(value, property):
            found.append(Call(name, kind.__name__, attribute, None))
        elif isinstance(inspect.getattr_static(kind, attribute), staticmethod):
            if kind.__name__ not in _NOT_CONSTRUCTED:  # what it makes, methods hand out
                found.append(Call(name, "", attribute, value))
        elif callable(value):
            found.append(Call(name, kind.__name__, attribute, value))
    return found


@functools.cache
def parameters(call: Call) -> tuple[tuple[str, bool], ...]:
    """(name, whether it must be given) of every parameter, those behind ** spelled out."""
    if call.function is None:
        return ()
    try:
        signature = inspect.signature(call.function)
    except ValueError:  # a slot of C without one, such as __hash__
        return ()
    found: list[tuple[str, bool]] = []
    for name, parameter in [*signature.parameters.items()][bool(call.receiver) :]:
        if parameter.kind == inspect.Parameter.VAR_KEYWORD:
            found += [(option, False) for option in _options(call, name)]
        elif parameter.kind in (
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.KEYWORD_ONLY,
        ):
            found.append((name, parameter.default is inspect.Parameter.empty))
    return tuple(found)


def _options(call: Call, name: str) -> list[str]:
    """The keyword options behind **sampling, **plan and **options."""
    sampling = sorted(SamplingOptions.__annotations__)
    if name == "sampling":
        return sampling
    if "chat" in call.attribute:
        return [*_TEMPLATE_OPTIONS, *(() if call.attribute == "render_chat" else sampling)]
    settings = [field.name for field in fields(DecodeConfig)]
    return [setting for setting in settings if setting in _PLANNING] if name == "plan" else settings
