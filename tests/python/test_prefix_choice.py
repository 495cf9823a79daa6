"""Which of several servers has a request: who knows its prompt, and who has least to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

orjson = pytest.importorskip("orjson", reason="needs tidaldecode[serve]")

from tidaldecode.server.prefix_choice import PIECE_BYTES, PrefixChoice, pieces_of  # noqa: E402


def chat(*texts: str, **more: Any) -> bytes:
    messages = [{"role": "user", "content": text} for text in texts]
    return orjson.dumps({"temperature": 0.5, "messages": messages} | more)


def test_pieces_stand_for_the_text_up_to_their_end():
    text = "The harbour was grey and still. " * 40
    short, long = pieces_of(chat(text), ""), pieces_of(chat(text, "More."), "")
    assert len(short) == -(-len(chat(text)) // PIECE_BYTES) == len(long)
    assert long[: len(short) - 1] == short[:-1] and long[-1] != short[-1]
    other = pieces_of(chat("x" + text), "")
    assert not set(other) & set(short)
    # What is not part of the prompt does not count; what keeps caches apart does.
    assert pieces_of(chat(text, max_tokens=5, model="m"), "") == short
    assert not set(pieces_of(chat(text), "key")) & set(short)
    assert not set(pieces_of(chat(text, cache_salt="s"), "")) & set(short)


DEEP = b'{"prompt":' + b"[" * 300 + b"]" * 300 + b"}"  # which orjson reads and does not write


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"5", b"\xff", b"{}", b'{"prompt"', b"null", DEEP]
)
def test_other_bodies_have_no_pieces(body: bytes):
    assert pieces_of(body, "") == []


@pytest.mark.parametrize("field", ["prompt", "input", "instructions", "system", "messages"])
def test_every_route_has_its_prompt(field: str):
    assert len(pieces_of(orjson.dumps({field: "a" * 1000}), "")) == 8
    assert len(pieces_of(orjson.dumps({field: [1] * 1000}), "")) == 16


def first(choice: PrefixChoice, servers: list[str], pieces: list[int]) -> str:
    """Who has a request that is answered at once."""
    with choice.asking(pieces) as asking:
        return asking.rank(servers)[0]


@contextmanager
def given(choice: PrefixChoice, server: str, pieces: list[int]) -> Iterator[None]:
    """A server has a request."""
    with choice.asking(pieces) as asking:
        asking.place(server)
        yield


def test_the_one_that_knows_a_prompt_has_it_again():
    choice = PrefixChoice(rows=4)
    pieces = list(range(8))
    with given(choice, "b", pieces):
        pass
    assert [first(choice, ["a", "b", "c"], pieces) for _ in range(3)] == ["b"] * 3
    assert first(choice, ["a", "b", "c"], [*pieces, 50, 51]) == "b"
    # It has ended: another one has the prompt, and is known to.
    with choice.asking(pieces) as asking:
        assert asking.rank([]) == []
    other = first(choice, ["a", "c"], pieces)
    assert first(choice, ["a", "b", "c"], pieces) == other != "b"


@pytest.mark.parametrize(("total", "expected"), [(8, "b"), (31, "b"), (32, "a"), (100, "a")])
def test_a_prompt_of_which_little_is_known_is_new(total: int, expected: str):
    choice = PrefixChoice(rows=4)
    with given(choice, "a", [900]):
        pass
    with given(choice, "b", list(range(8))):
        pass
    assert first(choice, ["a", "b"], list(range(8)) + list(range(100, 92 + total))) == expected


def test_load_comes_before_knowledge():
    choice = PrefixChoice(rows=2)
    pieces = list(range(8))
    with given(choice, "b", pieces):
        assert first(choice, ["a", "b"], pieces) == "b"
        with given(choice, "b", []):
            with choice.asking(pieces) as asking:
                assert asking.rank(["a", "b"]) == ["a", "b"]
        with given(choice, "b", pieces), given(choice, "a", []):
            assert first(choice, ["a", "b"], pieces) == "b"


def test_new_prompts_go_round_and_see_each_other():
    choice = PrefixChoice(rows=4)
    names = ["a", "b", "c"]
    assert {first(choice, names, [number]) for number in range(3)} == set(names)
    with given(choice, "a", [1]), given(choice, "b", [2]):
        assert [first(choice, names, [number]) for number in range(3, 6)] == ["c"] * 3
        # Several are ranked before the first of them is answered.
        with choice.asking([7]) as one, choice.asking([8]) as two:
            assert one.rank(names)[0] == "c"
            assert sorted([two.rank(names)[0], one.rank(names)[0]]) != ["c", "c"]
    assert not any(choice.loads.values())


def test_one_that_has_failed_is_tried_last():
    choice = PrefixChoice(rows=4)
    with given(choice, "b", [1]), choice.asking([1]) as asking:
        assert asking.rank(["a", "b"]) == ["b", "a"]
        asking.fail()
        assert asking.rank(["a", "b"]) == ["a", "b"]
        asking.fail()
        assert asking.rank(["a", "b", "c"])[0] == "c"
    assert not any(choice.loads.values())


def test_what_was_used_longest_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tidaldecode.server.prefix_choice._MOST_PIECES", 4)
    choice = PrefixChoice(rows=4)
    for pieces in ([1, 2], [3, 4], [1, 2], [5, 6]):
        with given(choice, "a", pieces):
            pass
    assert list(choice._owners) == [1, 2, 5, 6]
