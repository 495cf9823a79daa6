"""Calls of everything public with arguments that are right, nearly right and absurd.

What is public is found by introspection over tidaldecode.__all__ and what its calls return
(api_surface.py), so a new name is called as soon as it exists. A case is one call on a receiver in
one of its states; afterwards the pages that the receiver had free must be free again. An error of
the package must be one that the call's docstring names.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from api_docs import check_documented
from api_surface import RECEIVERS, Call, calls, parameters
from api_values import VALID, check_accepted, check_result
from hostile_values import NASTY, evaluate
from judge import Nonsense
from models import SMALL, write_config, write_model
from tidaldecode import Decoder

_NASTY_SHARE = 0.35
_UNKNOWN_KEYWORD = 0.01
_MOST_PIECES = 40  # of a stream that a case reads


class _Places:
    """The folders and decoders that cases of one worker share; a closed decoder is made again."""

    def __init__(self, workspace: Path) -> None:
        self.text = write_model(workspace / "model")
        self.bare = write_config(workspace / "bare")
        self._decoders: dict[str, Decoder] = {}

    def decoder(self, state: str) -> Decoder:
        """A decoder in this state (api_surface.RECEIVERS)."""
        if state not in self._decoders or "closed" in repr(self._decoders[state]):
            self._decoders[state] = self._make(state)
        return self._decoders[state]

    def _make(self, state: str) -> Decoder:
        options: dict[str, Any] = dict(SMALL)
        if state == "no text":
            return Decoder(self.bare, load_format="dummy", **options)
        if state == "dense":
            options["attention"] = "full"
        if state == "verify":
            options["verify"] = True
        decoder = Decoder(self.text, **options)
        if state == "closed":
            decoder.close()
        return decoder


_places: _Places | None = None


def prepare(workspace: Path) -> None:
    """Makes what the cases of this process share."""
    global _places
    _places = _Places(workspace)


def make_case(rng: random.Random) -> dict[str, Any]:
    """One call: {"call", "state", "arguments": {name: expression}}."""
    weights = [1 + len(parameters(call)) for call in calls()]
    (call,) = rng.choices(calls(), weights)
    arguments: dict[str, str] = {}
    for name, is_required in parameters(call):
        if not is_required and rng.random() < 0.6:
            continue
        valid = VALID.get(name, ())
        is_nasty = rng.random() < _NASTY_SHARE or not valid
        arguments[name] = rng.choice(NASTY if is_nasty else valid)
    if rng.random() < _UNKNOWN_KEYWORD:
        arguments["no_such_option"] = "1"
    return {
        "call": call.name,
        "state": rng.choice(RECEIVERS[call.receiver].states) if call.receiver else "",
        "arguments": arguments,
    }


def describe(case: dict[str, Any]) -> str:
    """The case as a line of Python."""
    state = f"  # {case['state']}" if case["state"] else ""
    arguments = ", ".join(f"{name}={value}" for name, value in case["arguments"].items())
    return f"{case['call']}({arguments}){state}"


def group(case: dict[str, Any]) -> str:
    """What a fault of this case is filed under."""
    name: str = case["call"]
    return name


def smaller(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The case with one argument less, or a simpler one."""
    for name in case["arguments"]:
        rest = {key: value for key, value in case["arguments"].items() if key != name}
        yield {**case, "arguments": rest}
        for simple in VALID.get(name, ())[:1]:
            if case["arguments"][name] != simple:
                yield {**case, "arguments": {**case["arguments"], name: simple}}


def run_case(case: dict[str, Any], workspace: Path) -> None:
    """Makes the call and looks at what it gave, took and left behind."""
    assert _places is not None
    call = next(entry for entry in calls() if entry.name == case["call"])
    with contextlib.ExitStack() as cleanup:
        host = _places.decoder(case["state"]) if call.receiver == "Decoder" else None
        if host is None:
            host = _places.decoder("tidal")
        free = None if "closed" in repr(host) else host.num_free_pages
        try:
            _run_call(call, case, host, cleanup)
        finally:
            cleanup.close()
        if free is not None and "closed" not in repr(host) and host.num_free_pages != free:
            left = free - host.num_free_pages
            host.close()
            raise Nonsense(f"{left} pages did not come back")


def _run_call(
    call: Call, case: dict[str, Any], host: Decoder, cleanup: contextlib.ExitStack
) -> None:
    assert _places is not None
    receiver = None
    if call.receiver:
        receiver = RECEIVERS[call.receiver].make(host, case["state"])
        if receiver is not host and hasattr(receiver, "close"):
            cleanup.callback(receiver.close)
    names = {"decoder": host, "model_dir": _places.text, "bare_dir": _places.bare}
    arguments = {key: evaluate(text, names) for key, text in case["arguments"].items()}
    with check_documented(call):
        result = call.invoke(receiver, arguments)
    if hasattr(result, "close") and result is not host:
        cleanup.callback(result.close)
    check_accepted(arguments)
    if hasattr(result, "__next__"):
        for _, _piece in zip(range(_MOST_PIECES), result, strict=False):
            pass
        result = getattr(result, "result", None)
    if result is not None:
        check_result(call.name, result)
