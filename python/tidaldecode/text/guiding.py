"""Keeps guided requests to their guides: a thread that answers the engine's questions.

Before each draw of a guided request the engine asks which tokens it may give
(cpp/include/tidal/guide.h); llguidance knows, and works without the GIL. Used by frontend.py: one
GuideWorker for a decoder, from its first guided request on. The thread ends with the decoder.
"""

from __future__ import annotations

import atexit
import importlib
import itertools
import json
import os
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tidaldecode import _core
from tidaldecode.errors import InvalidArgument, UnsupportedError, show
from tidaldecode.text.guide import JSON_OPTIONS, Guide

_MAX_COMPILED = 64
_WORD_BITS = 32
_END_SECONDS = 10.0
_DEAD = ("NoExtension", "NoExtensionBias")
_MARKER = re.compile(r"(<\|[^|]*\|>)")  # a special token within a text
_DEAD_END = "no token of the vocabulary goes on from here"

Mask = npt.NDArray[np.uint32]  # [words]: token id i is bit i % 32 of word i / 32


class _Tokens:
    """The bytes of a model's tokens, and what else llguidance asks of a tokenizer."""

    def __init__(self, read: Any, vocab_size: int) -> None:
        """Takes what llguidance has read of a tokenizer, which may have more tokens or fewer."""
        count = min(read.vocab_size, vocab_size)
        self.tokens = [read.decode_bytes([i]) for i in range(count)]
        self.tokens += [b""] * (vocab_size - count)
        self.special_token_ids = [i for i in range(count) if read.is_special_token(i)]
        # The end is a token of its own: which of the model's end a text, requests say.
        self.eos_token_id = vocab_size
        self.bos_token_id = None
        self.tokens.append(b"<|end of the text|>")
        self.special_token_ids.append(vocab_size)
        self._special = frozenset(self.special_token_ids)
        self._read = read

    def __call__(self, text: bytes) -> list[int]:
        """Token ids of what a grammar leaves no choice about; none if the model has none.

        A text may look like a special token, which it is not.
        """
        ids: list[int] = self._read.tokenize_bytes(text)
        size = self.eos_token_id
        if all(token_id < size and token_id not in self._special for token_id in ids):
            return ids
        pieces = [bytes([byte]) for byte in text]
        ids = [self.tokens.index(piece) for piece in pieces if piece in self.tokens]
        return ids if len(ids) == len(pieces) else []


class Vocabulary:
    """A model's tokens as llguidance knows them."""

    def __init__(self, tokenizer_json: str, vocab_size: int) -> None:
        """Reads a tokenizer.

        Args:
            tokenizer_json: as tokenizer.json has it.
            vocab_size: rows of the model's embedding table, which may be more tokens or fewer.

        Raises: UnsupportedError without llguidance, or for a kind of tokenizer it does not know.
        """
        self.library = _llguidance()
        self.size = vocab_size
        try:
            self._tokens = _Tokens(self.library.LLTokenizer(tokenizer_json), vocab_size)
            self.tokenizer = self.library.LLTokenizer(self.library.TokenizerWrapper(self._tokens))
        except BaseException as cause:  # a panic of the Rust library is no Exception
            if not _is_of_library(cause):
                raise
            raise UnsupportedError(
                f"guide: cannot be used with this folder's tokenizer: {_first_line(cause)}"
            ) from cause

    @property
    def special_token_ids(self) -> Sequence[int]:
        """Tokens that stand for no text."""
        return self._tokens.special_token_ids

    def literal(self, text: str) -> str:
        """A text in a Lark grammar: the special tokens of these names, and else its characters."""
        pieces = (self._literal_piece(piece) for piece in _MARKER.split(text) if piece)
        return " ".join(pieces)

    def _literal_piece(self, text: str) -> str:
        name = text.encode()
        for token_id in self.special_token_ids:
            if self._tokens.tokens[token_id].removeprefix(b"\xff") == name:
                return f"<[{token_id}]>"
        return json.dumps(text, ensure_ascii=False)

    @property
    def num_words(self) -> int:
        """Words of a mask."""
        return -(-self.size // _WORD_BITS)

    def mask_of(self, token_ids: Collection[int]) -> Mask:
        """The mask that allows these tokens, as far as the model has them."""
        mask = np.zeros(self.num_words, np.uint32)
        for token_id in token_ids:
            if 0 <= token_id < self.size:
                mask[token_id // _WORD_BITS] |= np.uint32(1 << token_id % _WORD_BITS)
        return mask


@dataclass(frozen=True)
class Ends:
    """What ends a call's texts."""

    stop_token_ids: Collection[int]  # whatever does
    eos_token_ids: Collection[int]  # what the model ends its texts with


class GuidedCall:
    """A guide, and what ends a text, as the requests of one call follow them."""

    def __init__(self, matcher: Any, vocabulary: Vocabulary, ends: Ends) -> None:
        """Takes a matcher at the beginning of a text, which is copied for each request."""
        self.key = 0  # SamplingParams.guide; GuideWorker gives it
        self.matcher = matcher
        self.ends = frozenset(ends.stop_token_ids)
        self.end_mask = vocabulary.mask_of(self.ends)
        # What ends the model's texts is no part of one. Special tokens are none anyway, unless a
        # grammar names them.
        plain_ends = set(ends.eos_token_ids).difference(vocabulary.special_token_ids)
        self.inner_mask = ~vocabulary.mask_of(plain_ends)


class GuideWorker:
    """Compiles guides, and answers the questions of one decoder on a thread of its own."""

    def __init__(self, desk: _core.GuideDesk, vocabulary: Vocabulary) -> None:
        """Starts the thread, which ends when the desk is closed."""
        self._vocabulary = vocabulary
        self._compiled: OrderedDict[Guide, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._keys = itertools.count(1)
        self._calls: weakref.WeakValueDictionary[int, GuidedCall] = weakref.WeakValueDictionary()
        answerer = _Answerer(desk, vocabulary, self._calls)
        self._thread = threading.Thread(target=answerer.run, name="tidaldecode-guides", daemon=True)
        self._thread.start()
        _running[self._thread] = desk

    def open(self, guide: Guide, ends: Ends) -> GuidedCall:
        """What requests of a call follow; it must live until they have ended.

        Raises: InvalidArgument for a guide that is wrong, or that llguidance cannot keep to.
        """
        call = GuidedCall(self._compile(guide), self._vocabulary, ends)
        call.key = next(self._keys)
        self._calls[call.key] = call
        return call

    def _compile(self, guide: Guide) -> Any:
        with self._lock:
            if (known := self._compiled.get(guide)) is not None:
                self._compiled.move_to_end(guide)
                return known
        matcher = compile_guide(guide, self._vocabulary)
        with self._lock:
            self._compiled[guide] = matcher
            while len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        return matcher


def compile_guide(guide: Guide, vocabulary: Vocabulary) -> Any:
    """A matcher of llguidance at the beginning of a text.

    Raises: InvalidArgument naming what is wrong or not supported, and where.
    """
    matcher_class = vocabulary.library.LLMatcher
    try:
        if guide.kind == "json_schema":
            grammar = matcher_class.grammar_from_json_schema(guide.source, defaults=JSON_OPTIONS)
        elif guide.kind == "regex":
            grammar = matcher_class.grammar_from_regex(guide.source)
        else:
            grammar = json.dumps({"grammars": [{"lark_grammar": guide.source}]})
        if guide.reasoning is not None:
            grammar = _behind_reasoning(grammar, guide, vocabulary)
        matcher = matcher_class(vocabulary.tokenizer, grammar, log_level=0)
        problem = matcher.get_error() if matcher.is_error() else ""
    except BaseException as cause:
        if not _is_of_library(cause):
            raise
        problem = str(cause) or type(cause).__name__
    if not problem:
        return matcher
    reasons = [line for line in problem.splitlines() if line.startswith("error: ")]
    text = " ".join([_first_line(problem), *reasons])
    place = _place(json.loads(guide.source), text) if guide.kind == "json_schema" else None
    where = f" at {show(place, 200)}" if place else ""
    raise InvalidArgument(
        f"guide: {guide.kind}{where}: {text}; expected what llguidance supports, correct or "
        "simplify it"
    )


def _behind_reasoning(grammar: str, guide: Guide, vocabulary: Vocabulary) -> str:
    """A grammar of llguidance for what comes behind reasoning."""
    tags = guide.reasoning
    assert tags is not None
    begin, end, next_one, head = (
        vocabulary.literal(tag) for tag in (tags.begin, tags.end, tags.next, tags.answer)
    )
    thought = f"thought: /(.|\\n)*/ {end}"  # no text runs into a special token
    if end.startswith('"'):
        escaped = re.escape(tags.end).replace("/", r"\/")
        thought = f"thought[lazy]: /(.|\\n)*{escaped}/"
    between = next_one or "space"
    if guide.begins_inside:
        start = f"({begin})? thought {between}"
    else:
        start = f"({begin} thought {between})?"
    first = f"start: {start} {head} @answer\n{thought}\nspace: /[ \\n]*/\n"
    grammars = json.loads(grammar)["grammars"]
    grammars[0]["name"] = "answer"
    return json.dumps({"grammars": [{"lark_grammar": first}, *grammars]})


class _Walk:
    """How far a request has followed its guide."""

    def __init__(self, call: GuidedCall) -> None:
        self.call = call
        self.matcher = call.matcher.deep_copy()
        self._tokens: list[int] = []
        self._num_fed = 0  # of those; all but what stands behind an end
        self.problem = ""

    @property
    def has_ended(self) -> bool:
        """Whether the tokens hold one that ends the text: what follows does not matter."""
        return self._num_fed < len(self._tokens) and not self.problem

    def move(self, keep: int, tokens: Sequence[int]) -> None:
        """Goes back to the first `keep` tokens, then on along others."""
        back = self._num_fed - keep
        if self.problem or (back > 0 and not self.matcher.rollback(back)):
            self.matcher, self._num_fed, self.problem = self.call.matcher.deep_copy(), 0, ""
        self._num_fed = min(self._num_fed, keep)
        self._tokens[keep:] = tokens
        left = self._tokens[self._num_fed :]
        end = next((i for i, token in enumerate(left) if token in self.call.ends), len(left))
        num_fed = self.matcher.try_consume_tokens(left[:end])
        self._num_fed += num_fed
        if num_fed < end:
            self.problem = f"does not allow token {left[num_fed]}, which was drawn"


class _Answerer:
    """What the thread runs. Holds nothing that holds the decoder."""

    def __init__(
        self,
        desk: _core.GuideDesk,
        vocabulary: Vocabulary,
        calls: weakref.WeakValueDictionary[int, GuidedCall],
    ) -> None:
        self._desk = desk
        self._vocabulary = vocabulary
        self._calls = calls
        self._walks: dict[int, _Walk] = {}  # by request
        threads = max(1, min(4, (os.cpu_count() or 1) // 2))
        self._executor = vocabulary.library.LLExecutor(num_threads=threads)
        self._fill = importlib.import_module("llguidance.numpy")

    def run(self) -> None:
        """Answers until the desk is closed."""
        while not self._desk.is_closed:
            questions = self._desk.wait(1.0)
            answers = list(self._answers(questions))
            if answers:
                self._desk.answer(answers)

    def _answers(
        self, questions: Sequence[tuple[int, int, int, int, list[int], bool]]
    ) -> Iterator[tuple[int, int, bytes, bool, str]]:
        asked: list[tuple[int, int, _Walk]] = []
        for request, guide, number, keep, tokens, is_over in questions:
            if is_over:
                self._walks.pop(request, None)
                continue
            try:
                walk = self._walk(request, guide)
                walk.move(keep, tokens)
                asked.append((request, number, walk))
            except BaseException as cause:  # a panic of the Rust library is no Exception
                yield request, number, b"", False, f"guide: {_first_line(cause)}"
        try:
            masks = self._masks([walk for _, _, walk in asked])
        except BaseException as cause:
            for request, number, _ in asked:
                yield request, number, b"", False, f"guide: {_first_line(cause)}"
            return
        for (request, number, walk), mask in zip(asked, masks, strict=True):
            yield request, number, *self._answer(walk, mask)

    def _walk(self, request: int, guide: int) -> _Walk:
        walk = self._walks.get(request)
        if walk is None:
            call = self._calls.get(guide)
            if call is None:
                raise InvalidArgument(f"{guide}: is not known, or its call has gone")
            walk = self._walks[request] = _Walk(call)
        return walk

    def _masks(self, walks: Sequence[_Walk]) -> Mask:
        """What llguidance allows next, [len(walks), words]."""
        words = -(-(self._vocabulary.size + 1) // _WORD_BITS)
        filled = np.zeros((len(walks), words), np.int32)
        todo = [
            (walk.matcher, row)
            for row, walk in enumerate(walks)
            if not (walk.has_ended or walk.problem)
        ]
        if len(todo) == 1:
            self._fill.fill_next_token_bitmask(todo[0][0], filled, todo[0][1])
        elif todo:
            self._fill.fill_next_token_bitmask_par(self._executor, todo, filled)
        masks: Mask = filled.view(np.uint32)
        end = self._vocabulary.size
        masks[:, end // _WORD_BITS] &= np.uint32(~(1 << end % _WORD_BITS) & 0xFFFFFFFF)
        return masks[:, : self._vocabulary.num_words]

    def _answer(self, walk: _Walk, mask: Mask) -> tuple[bytes, bool, str]:
        """The mask with the ends that may come, whether only ends may, and why it cannot go on."""
        if walk.has_ended:
            return np.full_like(mask, 0xFFFFFFFF).tobytes(), False, ""
        matcher = walk.matcher
        if not walk.problem and matcher.is_error():
            is_dead = matcher.stop_reason() in _DEAD or "NoExtension" in matcher.get_error()
            walk.problem = _DEAD_END if is_dead else _first_line(matcher.get_error())
        if walk.problem:
            return b"", False, f"guide: {walk.problem}"
        is_accepting = matcher.is_accepting()
        mask = mask & walk.call.inner_mask
        is_complete = is_accepting and not mask.any()
        if is_accepting:
            mask |= walk.call.end_mask
        if not (is_complete or mask.any()):
            return b"", False, f"guide: {_DEAD_END}"
        return mask.tobytes(), is_complete, ""


# Threads that run, with their desks: they end before the interpreter does.
_running: weakref.WeakKeyDictionary[threading.Thread, _core.GuideDesk] = weakref.WeakKeyDictionary()


@atexit.register
def _end_threads() -> None:
    for thread, desk in list(_running.items()):
        desk.close()
        thread.join(_END_SECONDS)


def _llguidance() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError as cause:
        raise UnsupportedError(
            "guide: llguidance is not installed; pip install 'tidaldecode[structured]'"
        ) from cause


def _is_of_library(cause: BaseException) -> bool:
    """Whether an error, or a panic, is llguidance's own."""
    return isinstance(cause, Exception) or type(cause).__name__ == "PanicException"


def _first_line(problem: object) -> str:
    lines = str(problem).strip().splitlines()
    return show(lines[0], 300)[1:-1] if lines else ""


def _place(schema: Any, problem: str) -> str | None:
    """Where in a schema stands what a message has in quotes or behind its colon, as a pointer."""
    words = {part.strip(" []\"'`,.") for part in problem.replace(",", '"').split('"')}
    words |= {problem.rpartition(":")[2].strip(" []\"'`,.")}

    def search(value: Any, path: str) -> str | None:
        pairs: Any = ()
        if isinstance(value, dict):
            if any(key in words for key in value):
                return path or "/"
            pairs = value.items()
        elif isinstance(value, list):
            pairs = enumerate(value)
        elif isinstance(value, str) and value in words:
            return path
        found = (search(inner, f"{path}/{key}") for key, inner in pairs)
        return next((one for one in found if one is not None), None)

    return search(schema, "")
