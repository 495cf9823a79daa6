"""Streams of events that have names, as /v1/messages and /v1/responses write them.

Each is one answer's. It consists of blocks: reasoning, text, or a call; another kind, or the next
call, closes the block before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import orjson

from tidaldecode.results import GenerationResult
from tidaldecode.server.answer import Delta
from tidaldecode.server.answer_parts import AnswerParts, NewParts, PartReader
from tidaldecode.server.answering import Answering
from tidaldecode.server.errors import ApiError
from tidaldecode.server.event_stream import check_delta


def named_event(fields: dict[str, Any]) -> bytes:
    """An event that is called as its type."""
    kind: str = fields["type"]
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(fields) + b"\n\n"


REASONING, TEXT, CALL = "reasoning", "text", "call"


@dataclass
class Block:
    """The part of an answer that is being written."""

    kind: str  # REASONING, TEXT or CALL
    index: int  # among the answer's blocks
    name: str = ""  # of the tool that is called
    call_id: str = ""
    text: str = ""  # so far: of a call, its arguments


def blocks_of(parts: AnswerParts) -> list[Block]:
    """The blocks of a whole answer."""
    blocks = [Block(REASONING, 0, text=parts.reasoning)] if parts.reasoning else []
    for part in parts.parts:
        if isinstance(part, str):
            blocks.append(Block(TEXT, len(blocks), text=part))
        else:
            call = part.call
            blocks.append(Block(CALL, len(blocks), call.name, part.id, call.arguments))
    return blocks


class TypedEvents(ABC):
    """The events of one answer. Subclasses say how the stream and each block begin and end."""

    def __init__(self, answering: Answering) -> None:
        """Takes what is answered."""
        self.of = answering
        self.blocks: list[Block] = []  # that have ended
        self._block: Block | None = None
        self._reader = PartReader(answering.form)
        self._interval = answering.service.settings.stream_interval
        self._held = ""  # text that waits for more tokens
        self._num_held = 0  # tokens of it
        self.has_begun = False  # the opening has been written
        self.result: GenerationResult | None = None  # once it has ended

    @abstractmethod
    def opening(self) -> bytes:
        """Events in front of all blocks."""

    @abstractmethod
    def begin(self, block: Block) -> bytes:
        """Events that begin a block."""

    @abstractmethod
    def piece(self, block: Block, text: str) -> bytes:
        """The event of a piece of a block."""

    @abstractmethod
    def finish(self, block: Block) -> bytes:
        """Events that end a block."""

    @abstractmethod
    def closing(self, result: GenerationResult, usage: dict[str, Any]) -> bytes:
        """Events behind all blocks."""

    @abstractmethod
    def fail(self, error: ApiError) -> bytes:
        """Events that end a stream which has failed."""

    @property
    def has_calls(self) -> bool:
        """Whether tools have been called."""
        return bool(self._reader.call_ids)

    def add_empty(self) -> bytes:
        """Events of a text that is empty."""
        return self._begin_block(TEXT) + self._end_block()

    def write(self, deltas: list[Delta]) -> bytes:
        """Events of what has come.

        Raises: ApiError for an answer that has failed.
        """
        events = b"" if self.has_begun else self.opening()
        self.has_begun = True
        for delta in deltas:
            check_delta(delta, self.of.service)
            self._held += delta.text
            self._num_held += len(delta.token_ids or ())
            self.result = delta.result or self.result
        is_last = self.result is not None
        if is_last or (self._held and self._num_held >= self._interval):
            events += self._blocks_of(self._reader.read(self._held, is_last=is_last))
            self._held, self._num_held = "", 0
        return events + (self._end_block() if is_last else b"")

    def end(self) -> bytes:
        """Events behind the answer's end."""
        assert self.result is not None
        return self.closing(self.result, self.of.account([self.result]))

    def _blocks_of(self, new: NewParts) -> bytes:
        """Events of what is new of an answer."""
        events = self._add_text(REASONING, new.reasoning) if new.reasoning else b""
        for part in new.parts:
            if isinstance(part, str):
                events += self._add_text(TEXT, part)
                continue
            if part.name is not None:
                events += self._begin_block(CALL, part.name, self._reader.call_ids[part.index])
            events += self._add(part.arguments) if part.arguments else b""
        return events

    def _add_text(self, kind: str, text: str) -> bytes:
        """Events of text, which goes on with the block that is being written if that is one."""
        if self._block is not None and self._block.kind == kind:
            return self._add(text)
        return self._begin_block(kind) + self._add(text)

    def _begin_block(self, kind: str, name: str = "", call_id: str = "") -> bytes:
        events = self._end_block()
        self._block = Block(kind, len(self.blocks), name, call_id)
        return events + self.begin(self._block)

    def _add(self, text: str) -> bytes:
        assert self._block is not None
        self._block.text += text
        return self.piece(self._block, text)

    def _end_block(self) -> bytes:
        block, self._block = self._block, None
        if block is None:
            return b""
        self.blocks.append(block)
        return self.finish(block)
