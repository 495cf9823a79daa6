"""What a stream tells of the positions that its steps read: bins, their texts, how often."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")

from serving import Served, events_of, serving  # noqa: E402
from tidaldecode import _core  # noqa: E402
from tidaldecode.cli.demo_text import hide_key  # noqa: E402
from tidaldecode.server.selection import MAX_BINS, PromptBins, SelectionWatch, bins_of  # noqa: E402

ROUTE = "/v1/chat/completions"


# Bins and texts


def test_bins_cover_the_prompt():
    bins = bins_of([b"ab"] * 1300, ["ab" * 1300])
    assert len(bins.edges) == MAX_BINS + 1 and bins.edges[0] == 0 and bins.edges[-1] == 1300
    assert set(np.diff(bins.edges)) == {2, 3}
    assert bins.messages == [0] * (MAX_BINS + 1)
    assert bins.offsets == (2 * bins.edges).tolist()


def test_a_short_prompt_has_a_bin_for_each_token():
    bins = bins_of([b"<u>", b"one", b" two", b"<e>"], ["one two"])
    assert bins.edges.tolist() == [0, 1, 2, 3, 4]
    assert bins.offsets == [0, 0, 3, 7, 7]


def test_offsets_are_characters_of_the_message_an_edge_lies_in():
    # "né" and a sign of three bytes that two tokens share.
    tokens = [b"<", b"n\xc3", b"\xa9", b"\xe6\x97", b"\xa5", b">", b"<", b"so", b">"]
    bins = bins_of(tokens, ["né日", "so"])
    assert bins.messages == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert bins.offsets == [0, 0, 2, 2, 3, 3, 3, 0, 2, 2]


def test_the_same_text_twice_is_found_twice():
    bins = bins_of([b"a", b"-", b"a", b"-"], ["a", "a"])
    assert bins.messages == [0, 0, 1, 1, 1]


def test_a_template_may_take_the_space_around_a_message_away():
    bins = bins_of([b"<", b"hi", b" you", b">"], ["  hi you\n"])
    assert bins.messages == [0] * 5 and bins.offsets == [2, 2, 4, 8, 8]


def test_a_tokenizer_may_compose_signs():
    # As Qwen's: an e and an accent of two characters are one in the prompt.
    content = "cafe\u0301 noir\n" + "de\u0301ja\u0300 vu\nend"
    prompt = "<café noir\ndéjà vu\nend>"
    bins = bins_of([sign.encode() for sign in prompt], [content])
    assert bins.messages == [0] * (len(prompt) + 1)
    lines = [bins.offsets[prompt.index(start)] for start in ("café", "déjà", "end")]
    assert lines == [0, content.index("de"), content.index("end")]
    assert bins.offsets == sorted(bins.offsets) and bins.offsets[-1] == len(content)


@pytest.mark.parametrize("content", [None, "", "  ", [{"type": "text", "text": "a"}], "other"])
def test_what_is_not_in_the_prompt_has_no_place(content: Any):
    bins = bins_of([b"a", b"b"], [content])
    assert bins.messages == [-1, -1, -1] and bins.offsets == [0, 0, 0]


def test_positions_are_counted_by_layer_and_bin():
    bins = PromptBins(edges=np.array([0, 2, 5]), messages=[0, 0, 0], offsets=[0, 2, 5])
    chosen = {7: np.array([[0, 1, 4, 6], [2, 3, -1, -1]], np.int32), 2: np.array([[1]], np.int32)}
    assert bins.count(chosen) == [
        {"layer": 2, "sets": 1, "bins": [1, 0], "answer": 0},
        {"layer": 7, "sets": 2, "bins": [2, 3], "answer": 1},
    ]


# The stream


HAS_CUDA = any(d["available"] and d["name"].startswith("cuda") for d in _core.list_devices())
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=CUDA)])
def served(demo_model: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    # On a GPU texts of this length are decoded densely, if nobody says otherwise.
    engine = {"max_seq_len": 4096, "attention": "tidal", "sparse_min_context": 0}
    engine["device"] = request.param
    with serving(demo_model, engine=engine) as served:
        yield served


def key_question(served: Served, num_tokens: int) -> tuple[str, str, int]:
    """A text that hides a key and asks for it; its number, and which character says it."""
    tokenizer = served.decoder._frontend._tokenizer
    prompt = hide_key(tokenizer.encode, num_tokens, 3)
    text = tokenizer.decode(prompt.prompt_ids).strip()
    return text, prompt.number, text.index(prompt.number)


def ask(served: Served, text: str, **more: Any) -> tuple[list[dict[str, Any]], list[float]]:
    """The chunks of a stream with return_selection, and when each came."""
    body = {"messages": [{"role": "user", "content": text}], "stream": True, "temperature": 0}
    body |= {"return_selection": True, "stream_options": {"include_usage": True}} | more
    chunks, times = [], []
    with httpx.stream("POST", served.url + ROUTE, json=body, timeout=60) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line.removeprefix("data: ")))
                times.append(time.monotonic())
    assert time.monotonic() - times[-1] < 5, "it waited for news, and there was no more"
    return chunks, times


def extras(chunks: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    found = [c["tidaldecode"][name] for c in chunks if name in c.get("tidaldecode", {})]
    assert all(c["choices"] == [] for c in chunks if "tidaldecode" in c)
    return found


def test_the_bin_that_holds_the_key_is_read(served: Served):
    text, number, at = key_question(served, 2000)
    chunks, _ = ask(served, text)
    answer = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert answer == number
    (where,) = extras(chunks, "selection_map")
    events = extras(chunks, "selection")
    assert where["edges"][-1] == where["prompt_tokens"] == chunks[-1]["usage"]["prompt_tokens"]
    assert len(where["edges"]) == len(where["messages"]) == len(where["offsets"]) == 513
    assert where["kv_bytes_per_token"] > 0
    of_key = [i for i in range(512) if where["offsets"][i] <= at < where["offsets"][i + 1]]
    assert len(of_key) == 1
    last = events[-1]
    assert last["tokens"] == chunks[-1]["usage"]["completion_tokens"] and last["index"] == 0
    layers = tuple(layer["layer"] for layer in last["layers"])
    assert layers == served.decoder.config.select_layers
    for layer in last["layers"]:
        assert len(layer["bins"]) == 512 and layer["answer"] > 0
        size = (sum(layer["bins"]) + layer["answer"]) / layer["sets"]
        assert size == served.decoder.config.token_budget
    assert any(layer["bins"][of_key[0]] > 0 for layer in last["layers"])


def test_the_last_event_has_the_sets_of_the_last_step(served: Served):
    text, _, _ = key_question(served, 1500)
    chunks, _ = ask(served, text, max_tokens=9, ignore_eos=True)
    (where,) = extras(chunks, "selection_map")
    edges = np.array(where["edges"])
    chosen = served.decoder.selection()
    for layer in extras(chunks, "selection")[-1]["layers"]:
        positions = chosen[layer["layer"]]
        counted = np.histogram(positions, np.append(edges[:-1], edges[-1] - 0.5))[0]
        assert layer["bins"] == counted.tolist()
        assert layer["answer"] == int((positions >= edges[-1]).sum())


def test_a_long_answer_is_looked_at_ten_times_a_second_at_most(served: Served):
    text, _, _ = key_question(served, 1000)
    chunks, times = ask(served, text, max_tokens=1500, ignore_eos=True)
    at = [t for c, t in zip(chunks, times, strict=True) if "selection" in c.get("tidaldecode", {})]
    first = next(t for c, t in zip(chunks, times, strict=True) if c["choices"])
    jitter = 0.02  # of when an event is read
    assert 2 <= len(at) <= (times[-1] - first + jitter) / 0.1 + 2


def test_every_choice_is_looked_at(served: Served):
    text, _, _ = key_question(served, 1000)
    chunks, _ = ask(served, text, n=3, max_tokens=6, ignore_eos=True)
    assert {event["index"] for event in extras(chunks, "selection")} == {0, 1, 2}


def test_a_verified_answer_tells_what_its_drafts_read(served: Served):
    text, number, _ = key_question(served, 1500)
    chunks, _ = ask(served, text, attention="verified")
    assert chunks[-1]["usage"]["tidaldecode"]["attention"] == "verified"
    assert extras(chunks, "selection")


@pytest.mark.parametrize("more", [{"attention": "full"}, {"messages": None}])
def test_dense_steps_choose_nothing(served: Served, more: dict[str, Any]):
    text = "Hello" if "messages" in more else key_question(served, 1000)[0]
    chunks, _ = ask(served, text, max_tokens=4, **{k: v for k, v in more.items() if v})
    assert len(extras(chunks, "selection_map")) == 1 and not extras(chunks, "selection")


def test_a_dense_stream_holds_nobody_up(served: Served, monkeypatch: pytest.MonkeyPatch):
    looks: list[int] = []
    monkeypatch.setattr(SelectionWatch, "_read", lambda *_: looks.append(1))
    ask(served, key_question(served, 1000)[0], max_tokens=4, attention="full")
    assert not looks


@pytest.mark.parametrize("attention", ["tidal", "verified", "full"])
def test_several_choices_behind_a_key(demo_model: Path, attention: str):
    engine = {"max_seq_len": 4096, "attention": "tidal"}
    with serving(demo_model, engine=engine, api_keys=("first",)) as served:
        text, _, _ = key_question(served, 1000)
        body = {"messages": [{"role": "user", "content": text}], "stream": True, "n": 2}
        body |= {"return_selection": True, "attention": attention, "max_tokens": 6, "seed": 1}
        assert served.post(ROUTE, body).status_code == 401
        key = {"authorization": "Bearer first"}
        said = served.post(ROUTE, body | {"ignore_eos": True}, headers=key)
        assert said.status_code == 200
        chunks = [json.loads(each) for each in events_of(said.text)[:-1]]
        assert len(extras(chunks, "selection_map")) == 1
        told = {event["index"] for event in extras(chunks, "selection")}
        assert told == (set() if attention == "full" else {0, 1})
        ends = [c["choices"][0]["index"] for c in chunks if c["choices"]
                and c["choices"][0]["finish_reason"]]  # fmt: skip
        assert sorted(ends) == [0, 1]


def test_nobody_is_told_who_has_not_asked(served: Served):
    body = {"messages": [{"role": "user", "content": key_question(served, 1000)[0]}]}
    response = served.post(ROUTE, body | {"stream": True, "max_tokens": 4})
    assert "tidaldecode" not in "".join(events_of(response.text)[:-2])


def test_selection_needs_a_stream(served: Served):
    body = {"messages": [{"role": "user", "content": "a"}], "return_selection": True}
    response = served.post(ROUTE, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "return_selection"


def test_a_client_that_goes_leaves_nothing(served: Served):
    text, _, _ = key_question(served, 1000)
    body = {"messages": [{"role": "user", "content": text}], "stream": True, "ignore_eos": True}
    body |= {"return_selection": True, "max_tokens": 2000}
    with httpx.stream("POST", served.url + ROUTE, json=body, timeout=60) as response:
        for line in response.iter_lines():
            if '"selection":' in line:
                break
    # The module's server must be idle in the end.
