"""Reads JSON that comes in pieces, character by character, and knows the first that is wrong.

What reads is a generator: it yields where the text so far ends, and goes on when there is more. So
a grammar is written as functions that call each other, and remembers by itself where it stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]

_SPACE = " \t\n\r"
_DIGITS = "0123456789"
_HEX_DIGITS = _DIGITS + "abcdefABCDEF"
_ESCAPES = '"\\/bfnrtu'
_PLAIN_CHARS = re.compile(r'[^"\\\x00-\x1f]*')
_MAX_DEPTH = 100


class Broken(Exception):
    """The text is not what is read, from the next character on."""


class Tape:
    """A text that grows at its end and is read from its beginning."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0  # what has been read
        self.has_ended = False

    def peek(self) -> Reading[str]:
        """The next character; waits for it. At the end of the whole text there is none: Broken."""
        while self.at == len(self.text):
            if self.has_ended:
                raise Broken
            yield
        return self.text[self.at]

    def take(self, expected: str) -> Reading[str]:
        """The next character, if it is one of those expected."""
        character = yield from self.peek()
        if character not in expected:
            raise Broken
        self.at += 1
        return character

    def take_word(self, word: str) -> Reading[None]:
        """A word, character by character."""
        for character in word:
            yield from self.take(character)

    def skip_space(self) -> Reading[str]:
        """What follows white space, which is passed over."""
        while (character := (yield from self.peek())) in _SPACE:
            self.at += 1
        return character


def read_value(tape: Tape, depth: int = 0) -> Reading[None]:
    """Reads a value of any kind."""
    first = yield from tape.peek()
    if first == "{":
        yield from read_object(tape, depth)
    elif first == "[":
        yield from _read_items(tape, depth, "[]")
    elif first == '"':
        yield from _read_string(tape)
    elif first in "tfn":
        yield from tape.take_word({"t": "true", "f": "false", "n": "null"}[first])
    else:
        yield from _read_number(tape)


def read_object(tape: Tape, depth: int = 0) -> Reading[None]:
    """Reads an object."""
    yield from _read_items(tape, depth, "{}")


def read_text(tape: Tape) -> Reading[str]:
    """Reads a string; returns what it says."""
    begin = tape.at
    yield from _read_string(tape)
    text: str = json.loads(tape.text[begin : tape.at])
    return text


def _read_items(tape: Tape, depth: int, brackets: str) -> Reading[None]:
    """Reads what stands in brackets, "{}" or "[]", with commas between."""
    begin, end = brackets[0], brackets[1]
    if depth == _MAX_DEPTH:
        raise Broken
    yield from tape.take(begin)
    if (yield from tape.skip_space()) == end:
        tape.at += 1
        return
    while True:
        yield from tape.skip_space()
        if begin == "{":
            yield from _read_string(tape)
            yield from tape.skip_space()
            yield from tape.take(":")
            yield from tape.skip_space()
        yield from read_value(tape, depth + 1)
        yield from tape.skip_space()
        if (yield from tape.take("," + end)) == end:
            return


def _read_string(tape: Tape) -> Reading[None]:
    yield from tape.take('"')
    while True:
        plain = _PLAIN_CHARS.match(tape.text, tape.at)
        assert plain is not None  # it may be empty
        tape.at = plain.end()
        if (yield from tape.peek()) not in '"\\':
            if tape.text[tape.at] < " ":
                raise Broken
            continue
        if (yield from tape.take('"\\')) == '"':
            return
        if (yield from tape.take(_ESCAPES)) == "u":
            for _ in range(4):
                yield from tape.take(_HEX_DIGITS)


def _read_number(tape: Tape) -> Reading[None]:
    if (yield from tape.peek()) == "-":
        tape.at += 1
    if (yield from tape.take(_DIGITS)) != "0":
        yield from _skip_digits(tape)
    if (yield from tape.peek()) == ".":
        tape.at += 1
        yield from tape.take(_DIGITS)
        yield from _skip_digits(tape)
    if (yield from tape.peek()) in "eE":
        tape.at += 1
        if (yield from tape.peek()) in "+-":
            tape.at += 1
        yield from tape.take(_DIGITS)
        yield from _skip_digits(tape)


def _skip_digits(tape: Tape) -> Reading[None]:
    while (yield from tape.peek()) in _DIGITS:
        tape.at += 1
