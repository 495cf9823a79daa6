"""How families of models write calls of tools, and what reads that as it comes.

hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, again and again (Qwen, Hermes)
llama3   {"name": ..., "parameters": {...}}, bare or behind <|python_tag|>; several with ; between
mistral  [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]name[ARGS]{...}, again
         and again, perhaps with [CALL_ID] and an id before [ARGS]
json     {"name": ..., "arguments": {...}}, or a list of those, and nothing before it

Used by tool_calls.py. A call's object may hold "id" and "type" as well, in any order; any other key
says that it is no call.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tidaldecode.text.json_reader import Broken, Reading, Tape, read_object, read_text, read_value
from tidaldecode.text.markers import beginning_at_end

_ARGUMENTS = ("arguments", "parameters")
_OTHER_KEYS = ("id", "type")
_NAME_CHARS = re.compile(r"[\w.\-]")
_SEPARATORS = " \t\n\r;"


@dataclass(frozen=True)
class Event:
    """What has been read: text outside of calls, of a call its name and then its arguments piece by
    piece, or the whole raw text of a call that broke off after that; in harmony.py reasoning too.
    """

    kind: Literal["reasoning", "content", "name", "arguments", "broken"]
    text: str
    index: int = -1  # of the call


class CallReader:
    """Reads an answer and notes what it finds; what may be a call is held until that is certain."""

    def __init__(self, syntax: Syntax, names: frozenset[str] | None) -> None:
        """Begins an answer; names: of the tools, or None for any."""
        self.tape = Tape()
        self.num_calls = 0
        self._syntax = syntax
        self._names = names
        self._events: list[Event] = []
        self._from = 0  # text before it has been given out, or is part of a call
        self._search = 0  # a marker may begin here
        self._is_at_start = True  # nothing but space so far
        self._is_behind_call = False  # the same, since a call
        self._is_in_call = False  # its name has been given out
        self._given: int | None = None  # where arguments go on that are given out while they come
        self._reading = self._read()

    def push(self, text: str) -> None:
        """Adds text."""
        self.tape.text += text
        next(self._reading)
        self._give_arguments()

    def finish(self) -> None:
        """Ends the answer."""
        self.tape.has_ended = True
        for _ in self._reading:
            pass

    def take_events(self) -> list[Event]:
        """What has been found since the last call."""
        events, self._events = self._events, []
        return events

    # What the syntaxes use

    def check(self, name: str) -> str:
        """The name, if a tool may have it."""
        if not name or (self._names is not None and name not in self._names):
            raise Broken
        return name

    def begin(self, name: str) -> None:
        """It is certain that this is a call."""
        self._is_in_call = True
        self._events.append(Event("name", name, self.num_calls))
        self.num_calls += 1

    def read_arguments(self) -> Reading[None]:
        """Reads the arguments of the call that has begun, giving them out as they come."""
        self._given = self.tape.at
        yield from read_object(self.tape)
        self._give_arguments()
        self._given = None

    def add_arguments(self, text: str) -> None:
        """Gives out arguments that are known."""
        self._events.append(Event("arguments", text, self.num_calls - 1))

    def end_call(self) -> None:
        """What has been read up to here is a whole call."""
        self._is_in_call = False
        self._is_behind_call = True
        self._from = self.tape.at

    def skip(self, word: str) -> Reading[bool]:
        """Passes over white space and a word, if they come next."""
        begin = self.tape.at
        try:
            yield from self.tape.skip_space()
            yield from self.tape.take_word(word)
        except Broken:
            self.tape.at = begin
            return False
        self._from = self.tape.at
        return True

    # The walk

    def _read(self) -> Reading[None]:
        while (yield from self._read_content()):
            try:
                yield from self._syntax.read(self)
                self._search = self._from
            except Broken:
                self._give_back()
            self._is_at_start = False

    def _read_content(self) -> Reading[bool]:
        """Gives out content up to where a call may begin; returns whether one may."""
        tape, marker = self.tape, self._syntax.marker
        while True:
            if self._is_at_start and self._syntax.may_be_bare:
                rest = tape.text.lstrip()
                if rest[:1] in ("{", "["):
                    tape.at = self._search = len(tape.text) - len(rest)
                    self._search += 1
                    return True
            found = tape.text.find(marker, self._search) if marker else -1
            if found >= 0:
                self._give_content(found)
                tape.at = self._search = found + len(marker)
                return True
            if tape.has_ended:
                break
            end = len(tape.text) - (beginning_at_end(tape.text, marker) if marker else 0)
            self._give_content(end)
            self._search = max(self._search, end) - self._from
            tape.text, self._from = tape.text[self._from :], 0
            yield
        if not (self._is_behind_call and not tape.text[self._from :].strip()):
            self._events.append(Event("content", tape.text[self._from :]))
        return False

    def _give_content(self, end: int) -> None:
        """Gives out text up to `end`, but for the white space there."""
        text = self.tape.text[self._from : end].rstrip()
        if not text:
            return
        self._events.append(Event("content", text))
        self._is_at_start = self._is_behind_call = False
        self._from += len(text)

    def _give_back(self) -> None:
        """What was read is no call: it becomes content, or what follows it, if it had begun."""
        if self._is_in_call:
            self._give_arguments()
            raw = self.tape.text[self._from : self.tape.at]
            self._events.append(Event("broken", raw, self.num_calls - 1))
            self._from = self.tape.at
            self._is_in_call = self._is_behind_call = False
        self._given = None
        self._search = max(self._search, self._from)

    def _give_arguments(self) -> None:
        if self._given is not None and self.tape.at > self._given:
            self.add_arguments(self.tape.text[self._given : self.tape.at])
            self._given = self.tape.at


@dataclass(frozen=True)
class Syntax:
    """A way to write calls."""

    marker: str  # calls stand behind it; empty: there is none
    may_be_bare: bool  # an answer that begins with JSON may be a call
    read: Callable[[CallReader], Reading[None]]  # what stands behind the marker, or bare


def _read_call(reader: CallReader) -> Reading[None]:
    """Reads the object of a call."""
    tape = reader.tape
    name: str | None = None
    known: str | None = None  # the arguments, if they came before the name
    has_begun = False
    yield from tape.take("{")
    while True:
        yield from tape.skip_space()
        key = yield from read_text(tape)
        yield from tape.skip_space()
        yield from tape.take(":")
        yield from tape.skip_space()
        if key == "name" and name is None:
            name = reader.check((yield from read_text(tape)))
        elif key in _ARGUMENTS and known is None and not has_begun:
            first = yield from tape.peek()
            begin = tape.at
            if first == "n":
                yield from tape.take_word("null")
            elif first != "{":
                raise Broken
            elif name is None:
                yield from read_object(tape)
                known = tape.text[begin : tape.at]
            else:
                has_begun = True
                reader.begin(name)
                yield from reader.read_arguments()
        elif key in _OTHER_KEYS:
            yield from read_value(tape)
        else:
            raise Broken
        yield from tape.skip_space()
        if (yield from tape.take(",}")) == "}":
            break
    if name is None:
        raise Broken
    if not has_begun:
        reader.begin(name)
        reader.add_arguments(known or "{}")
    reader.end_call()


def _read_calls(reader: CallReader) -> Reading[None]:
    """Reads a list of calls."""
    yield from reader.tape.take("[")
    while True:
        yield from reader.tape.skip_space()
        yield from _read_call(reader)
        yield from reader.tape.skip_space()
        if (yield from reader.tape.take(",]")) == "]":
            return reader.end_call()


def _read_hermes(reader: CallReader) -> Reading[None]:
    yield from reader.tape.skip_space()
    yield from _read_call(reader)
    yield from reader.skip("</tool_call>")


def _read_bare(reader: CallReader) -> Reading[None]:
    """Reads calls one after the other, or a list of them."""
    if (yield from reader.tape.skip_space()) == "[":
        return (yield from _read_calls(reader))
    while True:
        yield from _read_call(reader)
        try:
            while (yield from reader.tape.peek()) in _SEPARATORS:
                reader.tape.at += 1
        except Broken:
            return
        if reader.tape.text[reader.tape.at] != "{":
            return


def _read_mistral(reader: CallReader) -> Reading[None]:
    tape = reader.tape
    first = yield from tape.skip_space()
    if first == "[":
        return (yield from _read_calls(reader))
    if first == "{":
        return (yield from _read_call(reader))
    name = yield from _read_word(tape)
    reader.check(name)
    if (yield from tape.skip_space()) == "[":
        tape.at += 1
        if (yield from tape.peek()) == "C":
            yield from tape.take_word("CALL_ID]")
            yield from _read_word(tape)
            yield from tape.take("[")
        yield from tape.take_word("ARGS]")
    yield from tape.skip_space()
    yield from tape.take("{")
    tape.at -= 1
    reader.begin(name)
    yield from reader.read_arguments()
    reader.end_call()


def _read_word(tape: Tape) -> Reading[str]:
    begin = tape.at
    while _NAME_CHARS.match((yield from tape.peek())):
        tape.at += 1
    return tape.text[begin : tape.at]


SYNTAXES = {
    "hermes": Syntax("<tool_call>", False, _read_hermes),
    "llama3": Syntax("<|python_tag|>", True, _read_bare),
    "mistral": Syntax("[TOOL_CALLS]", False, _read_mistral),
    "json": Syntax("", True, _read_bare),
}
