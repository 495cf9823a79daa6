"""Which of several servers a request goes to: the one that has read the beginning of its prompt.

A prompt is cut into pieces, and each piece stands for all text up to its end. Whoever was given a
piece last has its keys and values, most likely. As vllm-router and SGLang's router do it, load
comes first: a server that has a whole batch more to do than another one is passed over.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import orjson

PIECE_BYTES = 128
# A prompt of which less is known is new: all begin alike, if only with the same system's message.
MIN_KNOWN = 0.25
_MOST_PIECES = 2**18  # remembered; those used last
_PROMPT_FIELDS = ("system", "instructions", "messages", "prompt", "input")


def pieces_of(body: bytes, salt: str) -> list[int]:
    """A number for each piece of a request's prompt, which stands for all text up to its end.

    Args:
        body: of the request; one that is no JSON object, or is nested beyond measure, has no
            pieces.
        salt: requests with different ones have no piece in common.
    """
    try:
        fields = orjson.loads(body)
        if not isinstance(fields, dict):
            return []
        prompt = b"".join(orjson.dumps(fields[name]) for name in _PROMPT_FIELDS if name in fields)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return []
    number = hash((salt, str(fields.get("cache_salt", ""))))
    pieces = []
    for start in range(0, len(prompt), PIECE_BYTES):
        number = hash((number, prompt[start : start + PIECE_BYTES]))
        pieces.append(number)
    return pieces


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The server that has a request."""

    name: str
    address: str  # http://host:port


class PrefixChoice:
    """What each server has been given, and what it has to do. For any thread."""

    def __init__(self, rows: int) -> None:
        """Takes the rows of a server's batch."""
        self.rows = rows
        self.lock = threading.Lock()
        self.loads: Counter[str] = Counter()  # requests under way, by server
        self.chosen_at: dict[str, float] = {}
        self._owners: OrderedDict[int, str] = OrderedDict()  # the server by piece

    @contextmanager
    def asking(self, pieces: Sequence[int]) -> Iterator[Asking]:
        """A request, for as long as it is under way."""
        asking = Asking(self, pieces)
        try:
            yield asking
        finally:
            with self.lock:
                asking.leave()

    def learn(self, server: str, pieces: Sequence[int]) -> None:
        """Notes who has been given a prompt. The lock is held."""
        for piece in pieces:
            self._owners[piece] = server
            self._owners.move_to_end(piece)
        while len(self._owners) > _MOST_PIECES:
            self._owners.popitem(last=False)

    def who_knows(self, servers: set[str], pieces: Sequence[int]) -> str | None:
        """The server with the longest part of a prompt, if that is enough of it."""
        for count in range(len(pieces), int(len(pieces) * MIN_KNOWN), -1):
            owner = self._owners.get(pieces[count - 1])
            if owner in servers:
                return owner
        return None


class Asking:
    """One request: it counts as its server's from the moment it is ranked.

    Many come at once, and each must see where the others before it go.
    """

    def __init__(self, choice: PrefixChoice, pieces: Sequence[int]) -> None:
        """Takes the pieces of the prompt."""
        self._choice = choice
        self._pieces = pieces
        self._server: str | None = None
        self._failed: set[str] = set()

    def rank(self, servers: Sequence[str]) -> list[str]:
        """The servers, in the order in which the request should try them."""
        choice = self._choice
        with choice.lock:
            self.leave()
            # Among those with as little to do, the one that has waited longest.
            ranked = sorted(
                servers,
                key=lambda name: (
                    name in self._failed, choice.loads[name], choice.chosen_at.get(name, 0),
                ),
            )  # fmt: skip
            known = choice.who_knows(set(servers) - self._failed, self._pieces)
            if known is not None and choice.loads[known] - choice.loads[ranked[0]] < choice.rows:
                ranked.remove(known)
                ranked.insert(0, known)
            if ranked:
                self._enter(ranked[0])
        return ranked

    def place(self, server: str) -> None:
        """Says who has the request, which need not be the first that was ranked."""
        with self._choice.lock:
            if server != self._server:
                self.leave()
                self._enter(server)

    def fail(self) -> None:
        """Says that its server did not answer."""
        if self._server is not None:
            self._failed.add(self._server)

    def _enter(self, server: str) -> None:
        self._server = server
        self._choice.loads[server] += 1
        self._choice.chosen_at[server] = time.monotonic()
        self._choice.learn(server, self._pieces)

    def leave(self) -> None:
        """Counts as nobody's. The lock is held."""
        if self._server is not None:
            self._choice.loads[self._server] -= 1
            self._server = None
