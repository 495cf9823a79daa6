"""The form in which gpt-oss answers: messages, each in a channel and perhaps to a tool.

<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
<|channel|>commentary to=functions.name <|constrain|>json<|message|>{...}<|call|>

What is said in "analysis" is reasoning, what is said to one of the tools are the arguments of a
call, everything else is content. Source: OpenAI, "OpenAI Harmony Response Format".
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Literal

from tidaldecode.text.call_syntax import Event
from tidaldecode.text.markers import beginning_at_end

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
FUNCTIONS = "functions."  # in front of a tool's name
_HEADS = (START, CHANNEL)  # a message begins with one
# A message ends with one; the last that the model draws is no part of its text.
_MARKERS = ("<|end|>", "<|call|>", "<|return|>", START)
_END = re.compile("|".join(map(re.escape, _MARKERS)))
_GAP = "\n\n"  # between messages of a kind

_Kind = Literal["reasoning", "content", "arguments"]  # of a message


def writes_harmony(chat_template: str | None) -> bool:
    """Whether a model with this template answers in channels."""
    return chat_template is not None and CHANNEL in chat_template and MESSAGE in chat_template


class HarmonyReader:
    """Takes an answer piece by piece, special tokens shown, and tells what each piece is.

    However the answer is cut into pieces, the same comes out. Text that no head stands before is
    content.
    """

    def __init__(
        self,
        names: Collection[str] | None,
        *,
        tells_reasoning: bool = True,
        begins_inside: bool = False,
    ) -> None:
        """Begins an answer.

        Args:
            names: of the tools; what is said to any other is content. None: any name is a tool.
            tells_reasoning: if not, it is content.
            begins_inside: the prompt has opened the reasoning.
        """
        self.num_calls = 0
        self._names = names
        self._events: list[Event] = []
        self._held = ""  # taken in, not given out: a head, or what may become a marker
        # The message that goes on is of this kind; None: in front of one.
        self._kind: _Kind | None = None
        self._told: set[_Kind] = set()  # of which there was a message before
        self._gap = ""  # stands before what comes next
        self._arguments = ""  # of the last call
        self._reasoning: _Kind = "reasoning" if tells_reasoning else "content"
        if begins_inside:
            self._kind = self._reasoning

    def push(self, text: str) -> None:
        """Adds text."""
        self._held += text
        while self._held and (self._read_head() if self._kind is None else self._read_body()):
            pass

    def finish(self) -> None:
        """Ends the answer. A head without a message is content, and so is a call that broke off."""
        text, self._held = self._held, ""
        if self._kind is None:
            self._begin("content")
        self._give(text)
        self._end()

    def take_events(self) -> list[Event]:
        """What has been found since the last call."""
        events, self._events = self._events, []
        return events

    def _read_head(self) -> bool:
        """Begins a message if its whole head is there; returns whether there is more to read."""
        held = self._held.lstrip()
        if not any(held.startswith(head) or head.startswith(held) for head in _HEADS):
            self._begin("content")
            return True
        head, found, body = held.partition(MESSAGE)
        if not found:
            return False
        self._held = body
        name = self._tool_in(head)
        channel = head.partition(CHANNEL)[2].lstrip()
        if name is not None:
            self._events.append(Event("name", name, self.num_calls))
            self.num_calls += 1
            self._arguments = ""
            self._begin("arguments")
        else:
            self._begin(self._reasoning if channel.startswith("analysis") else "content")
        return True

    def _read_body(self) -> bool:
        """Gives out a message up to its end, if that is there; returns whether it was."""
        text = self._held
        found = _END.search(text)
        if found is None:
            keep = len(text) - max(beginning_at_end(text, marker) for marker in _MARKERS)
            self._held = text[keep:]
            self._give(text[:keep])
            return False
        self._give(text[: found.start()])
        self._held = text[found.start() if found.group() == START else found.end() :]
        self._end()
        return True

    def _begin(self, kind: _Kind) -> None:
        self._kind = kind
        self._gap = _GAP if kind in self._told and kind != "arguments" else ""

    def _end(self) -> None:
        if self._kind == "arguments" and not _is_object(self._arguments):
            self._events.append(Event("broken", self._arguments, self.num_calls - 1))
        self._kind = None

    def _give(self, text: str) -> None:
        if not text or self._kind is None:
            return
        if self._kind == "arguments":
            self._arguments += text
        self._events.append(Event(self._kind, self._gap + text, self.num_calls - 1))
        self._gap = ""
        self._told.add(self._kind)

    def _tool_in(self, head: str) -> str | None:
        """The tool that a message is said to."""
        found = re.search(r"\bto=([^\s<]+)", head)
        name = found.group(1).removeprefix(FUNCTIONS) if found else ""
        return name if name and (self._names is None or name in self._names) else None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
