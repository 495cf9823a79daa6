"""What an answer to a chat is made of: reasoning, content, and calls of tools.

How a model writes them is known by its folder (text/reasoning.py, text/tool_calls.py), or set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tidaldecode.text.call_syntax import Event
from tidaldecode.text.harmony import HarmonyReader
from tidaldecode.text.reasoning import (
    ANALYSIS,
    ReasoningSplitter,
    ReasoningTags,
    find_reasoning_tags,
    split_reasoning,
)
from tidaldecode.text.tool_calls import (
    InOrder,
    ToolCall,
    ToolCallDelta,
    ToolCallParser,
    ToolText,
    find_tool_format,
    has_special_marker,
    new_call_id,
    parse_tool_calls,
    piece_of,
    text_of,
)

if TYPE_CHECKING:
    from tidaldecode.server.settings import ServeConfig
    from tidaldecode.server.text_workers import TextWorkers
    from tidaldecode.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class AnswerForm:
    """How a model writes what is no content. None: it does not, or nobody looks for it."""

    in_channels: bool = False  # as text/harmony.py reads; what follows says what is looked for
    tags: ReasoningTags | None = None
    begins_inside: bool = False  # the prompt has opened the reasoning
    tool_format: str | None = None
    tool_names: tuple[str, ...] = ()
    most_calls: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether all is content."""
        return self.tags is None and self.tool_format is None and not self.in_channels

    def without(self, *, tags: bool = False, calls: bool = False) -> AnswerForm:
        """The same, but nobody looks for tags, or for calls."""
        form = replace(self, tags=None) if tags else self
        return replace(form, tool_format=None) if calls else form

    def read(self, text: str) -> AnswerParts:
        """The parts of a whole text. A call that breaks off is content."""
        parts = AnswerParts()
        if self.in_channels:
            reader = self.channel_reader()
            reader.push(text)
            reader.finish()
            parts.reasoning, events = self.without_reasoning(reader.take_events())
            return self._with_parts(parts, text_of(events))
        if self.tags is not None:
            split = split_reasoning(text, self.tags, begins_inside=self.begins_inside)
            parts.reasoning, text = split.reasoning, split.content
        if self.tool_format is None:
            parts.add(text)
            return parts
        return self._with_parts(parts, parse_tool_calls(text, self.tool_format, self.tool_names))

    def channel_reader(self) -> HarmonyReader:
        """A reader of an answer in channels."""
        names = () if self.tool_format is None else self.tool_names
        return HarmonyReader(
            names, tells_reasoning=self.tags is not None, begins_inside=self.begins_inside
        )

    @staticmethod
    def without_reasoning(events: list[Event]) -> tuple[str, list[Event]]:
        """Reasoning, and what else was read."""
        reasoning = "".join(event.text for event in events if event.kind == "reasoning")
        return reasoning, [event for event in events if event.kind != "reasoning"]

    def _with_parts(self, parts: AnswerParts, found: ToolText) -> AnswerParts:
        for part in found.parts:
            if isinstance(part, str):
                parts.add(part)
            elif self.most_calls is None or len(parts.calls) < self.most_calls:
                parts.parts.append(NamedCall(new_call_id(self.tool_format or ""), part))
        return parts


@dataclass(frozen=True)
class NamedCall:
    """A call with the id that its result will be sent back under."""

    id: str
    call: ToolCall


@dataclass
class AnswerParts(InOrder[NamedCall]):
    """A whole answer."""

    reasoning: str = ""
    parts: list[str | NamedCall] = field(default_factory=list)  # behind it

    def add(self, content: str) -> None:
        """Adds content, of which texts without a call between them are one."""
        if self.parts and isinstance(last := self.parts[-1], str):
            self.parts[-1] = last + content
        elif content:
            self.parts.append(content)


@dataclass
class NewParts(InOrder[ToolCallDelta]):
    """What is new of an answer."""

    reasoning: str = ""
    parts: list[str | ToolCallDelta] = field(default_factory=list)  # behind it


class PartReader:
    """Takes an answer piece by piece."""

    def __init__(self, form: AnswerForm) -> None:
        """Begins an answer of this form."""
        self._form = form
        self._splitter: ReasoningSplitter | None = None
        self._parser: ToolCallParser | None = None
        self._channels: HarmonyReader | None = None
        self.call_ids: list[str] = []  # of the calls that have begun
        if form.in_channels:
            self._channels = form.channel_reader()
            return
        if form.tags is not None:
            self._splitter = ReasoningSplitter(form.tags, begins_inside=form.begins_inside)
        if form.tool_format is not None:
            self._parser = ToolCallParser(form.tool_format, form.tool_names)

    def read(self, text: str, *, is_last: bool) -> NewParts:
        """Adds text; returns what is certain now, with the last piece everything."""
        new = NewParts()
        if self._channels is not None:
            self._channels.push(text)
            if is_last:
                self._channels.finish()
            new.reasoning, events = AnswerForm.without_reasoning(self._channels.take_events())
            new.parts = [part for part in piece_of(events).parts if self._counts(part)]
            return new
        if self._splitter is not None:
            parts = self._splitter.push(text)
            rest = self._splitter.finish() if is_last else None
            new.reasoning = parts.reasoning + (rest.reasoning if rest else "")
            text = parts.content + (rest.content if rest else "")
        if self._parser is None:
            new.parts = [text] if text else []
        else:
            pieces = [self._parser.push(text)] + ([self._parser.finish()] if is_last else [])
            new.parts = [part for piece in pieces for part in piece.parts if self._counts(part)]
        return new

    def _counts(self, part: str | ToolCallDelta) -> bool:
        """Whether a part is given out; a call that begins gets its id."""
        if isinstance(part, str):
            return True
        if self._form.most_calls is not None and part.index >= self._form.most_calls:
            return False
        if part.name is not None:
            self.call_ids.append(new_call_id(self._form.tool_format or ""))
        return True


def find_form(texts: TextWorkers, settings: ServeConfig) -> AnswerForm:
    """How a folder's model writes calls and reasoning, unless the settings say it."""
    template, special = texts.chat_template, texts.special_tokens
    tags = None if settings.reasoning_parser == "none" else find_reasoning_tags(template)
    if settings.tool_call_parser == "auto":
        tool_format = find_tool_format(template, special)
    elif settings.tool_call_parser == "none":
        tool_format = None
    else:
        tool_format = settings.tool_call_parser
    in_channels = tool_format == "harmony" or tags is ANALYSIS
    return AnswerForm(in_channels=in_channels, tags=tags, tool_format=tool_format)


def shows_special_tokens(form: AnswerForm, special_tokens: frozenset[str]) -> bool:
    """Whether tags or markers of a form are special tokens: a text must show those to have them."""
    if form.in_channels:
        return has_special_marker("harmony", special_tokens)
    is_marked = form.tool_format is not None and has_special_marker(
        form.tool_format, special_tokens
    )
    return is_marked or (form.tags is not None and form.tags.end in special_tokens)


def count_reasoning(token_ids: Sequence[int], form: AnswerForm, tokenizer: Tokenizer) -> int:
    """How many tokens of an answer are its reasoning, tags included."""
    if form.tags is None:
        return 0
    pieces = tokenizer.token_bytes(token_ids)
    text = b"".join(pieces)
    begin, end = form.tags.begin.encode(), form.tags.end.encode()
    if not (form.begins_inside or text.lstrip().startswith(begin)):
        return 0
    last = text.find(end)
    if last < 0:
        return len(pieces)
    size = count = 0
    while size < last + len(end):
        size += len(pieces[count])
        count += 1
    return count
