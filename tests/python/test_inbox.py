"""The engine's inbox: the news of many requests taken at once, each token once and in its order."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tidaldecode import Decoder, _core
from tidaldecode.errors import InvalidArgument

Letter = tuple[int, list[int], bool]


class Box:
    """An inbox with its eventfd."""

    def __init__(self, decoder: Decoder) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.inbox = decoder._core.open_inbox(self.fd)

    def wait(self, seconds: float = 20.0) -> bool:
        """Whether it rings within so long."""
        rings = bool(select.select([self.fd], [], [], seconds)[0])
        if rings:
            os.eventfd_read(self.fd)
        return rings

    def letters(self) -> list[Letter]:
        assert self.wait(), "nobody has news"
        return self.inbox.take()


@pytest.fixture
def decoder(demo_model: Path) -> Iterator[Decoder]:
    decoder = Decoder(
        demo_model, device="cpu", num_threads=1, max_seq_len=256, max_batch_size=4, page_size=16
    )
    yield decoder
    decoder.close()


@pytest.fixture
def box(decoder: Decoder) -> Iterator[Box]:
    box = Box(decoder)
    yield box
    box.inbox.close()
    os.close(box.fd)


def start(decoder: Decoder, first: int, new_tokens: int = 20) -> _core.Generation:
    return decoder._core.start([[first, 7, 9]], [params(new_tokens)])


def params(new_tokens: int) -> _core.SamplingParams:
    params = _core.SamplingParams()
    params.max_new_tokens = new_tokens
    params.temperature = 0.0
    return params


def end_of(generation: _core.Generation) -> list[int]:
    """The tokens that come with the end."""
    tokens = []
    while not generation.done:
        tokens += [token_id for _, token_id in generation.advance(1.0)]
    return tokens


def test_all_tokens_of_all_requests_come_once(decoder: Decoder, box: Box):
    generations = {key: start(decoder, 5 + key) for key in range(9)}
    for key, generation in generations.items():
        assert box.inbox.add(generation, key)
    heard: dict[int, list[int]] = {key: [] for key in generations}
    left = set(generations)
    while left:
        for key, token_ids, has_more in box.letters():
            heard[key] += token_ids
            if has_more:
                heard[key] += end_of(generations[key])
                left.discard(key)
    for key, generation in generations.items():
        assert heard[key] == generation.results()[0].token_ids and len(heard[key]) == 20
        alone = decoder.generate([5 + key, 7, 9], max_new_tokens=20, temperature=0, ignore_eos=True)
        assert heard[key] == list(alone.token_ids)
    assert not box.wait(0.0) and box.inbox.take() == []


def test_requests_of_a_step_ring_once(decoder: Decoder, box: Box):
    generations = [start(decoder, 5 + key, 200) for key in range(4)]
    while decoder.stats()["num_decoding"] < 4:
        time.sleep(0.001)
    for key, generation in enumerate(generations):
        box.inbox.add(generation, key)
    time.sleep(0.05)  # passes go by, and nobody takes anything
    assert os.eventfd_read(box.fd) == 1
    letters = box.inbox.take()
    assert sorted(key for key, _, _ in letters) == [0, 1, 2, 3]
    assert all(len(token_ids) > 1 for _, token_ids, _ in letters)


def test_what_comes_meanwhile_is_left_to_who_is_added_again(decoder: Decoder, box: Box):
    generation = start(decoder, 5)
    box.inbox.add(generation, 1)
    heard = [token for _, token_ids, _ in box.letters() for token in token_ids]
    box.inbox.remove(generation)
    box.inbox.take()
    while generation.status(0) != "finished":
        time.sleep(0.001)
    assert box.inbox.take() == []
    box.inbox.add(generation, 2)
    ((key, token_ids, has_more),) = box.letters()
    assert key == 2 and has_more
    heard += token_ids + end_of(generation)
    assert heard == generation.results()[0].token_ids


def test_a_request_that_is_gone_has_no_news(decoder: Decoder, box: Box):
    generation = start(decoder, 5, 200)
    box.inbox.add(generation, 1)
    assert box.wait()
    generation.close()  # with a letter in line
    del generation
    assert box.inbox.take() == []
    closed = start(decoder, 6)
    closed.close()
    assert not box.inbox.add(closed, 2)
    box.inbox.remove(closed)


def test_what_a_stopped_request_says_is_its_end(decoder: Decoder, box: Box):
    generation = start(decoder, 5, 200)
    generation.stop(0, "stop")
    box.inbox.add(generation, 3)
    assert box.letters() == [(3, [], True)]
    assert generation.results()[0].finish_reason == "stop"


def test_a_closed_inbox_leaves_the_eventfd_alone(decoder: Decoder, box: Box):
    generation = start(decoder, 5, 200)
    box.inbox.close()
    with pytest.raises(InvalidArgument, match="inbox"):
        box.inbox.add(generation, 1)
    with pytest.raises(InvalidArgument, match="inbox"):
        box.inbox.take()
    assert not box.wait(0.05)


def test_only_single_requests_of_its_own_decoder_are_heard(
    decoder: Decoder, box: Box, demo_model: Path
):
    two = decoder._core.start([[5, 7], [6, 7]], [params(4), params(4)])
    with pytest.raises(InvalidArgument, match="expected one sequence"):
        box.inbox.add(two, 1)
    other = Decoder(demo_model, device="cpu", num_threads=1, max_seq_len=64, max_batch_size=1)
    with pytest.raises(InvalidArgument, match="of the inbox's decoder"):
        box.inbox.add(start(other, 5), 1)
    other.close()
