"""Guided texts: what the engine draws keeps to a schema, an expression, a grammar, in every way
that requests run."""

from __future__ import annotations

import gc
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import tidaldecode
from child_process import check_python
from json_schemas import SCHEMAS, is_valid
from scripted_model import BOS, EOS, write_byte_tokenizer
from test_verified import TIDAL
from tidaldecode import Decoder, Guide
from tidaldecode.errors import ConfigError, InvalidArgument, UnsupportedError
from tidaldecode.text.guiding import Vocabulary
from tiny_models import TinyModel, write_checkpoint

pytest.importorskip("llguidance")

# More rows than the tokenizer has tokens, and two that end a text.
MODEL = TinyModel(num_layers=5, num_q_heads=8, num_kv_heads=4, seed=31, eos_token_id=[EOS, BOS])
OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_seq_len": 512, "num_threads": 1,
}  # fmt: skip
RED = Guide.regex("(red|green|blue){2,4}")
LIST = Guide.grammar('start: "[" word ("," word)* "]"\nword: /[a-z]{1,3}/')
PERSON = Guide.json_schema(SCHEMAS[28])
NESTED = Guide.json_schema(SCHEMAS[30])
GUIDES = (RED, LIST, PERSON, NESTED, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("guided"), MODEL)
    return write_byte_tokenizer(folder)


@pytest.fixture(scope="module")
def dense(folder: Path):
    with Decoder(folder, attention="full", **OPTIONS) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def demo():
    model = tidaldecode.demo_model_dir()
    with Decoder(model, device="cpu", attention="full", max_seq_len=2048) as decoder:
        yield decoder


def keeps(text: str, guide: Guide) -> bool:
    """Whether a text is what its guide says."""
    if guide == RED:
        return re.fullmatch("(red|green|blue){2,4}", text) is not None
    if guide == LIST:
        return re.fullmatch(r"\[[a-z]{1,3}(,[a-z]{1,3})*\]", text) is not None
    return is_valid(json.loads(text), json.loads(guide.source))


# What comes out


@pytest.mark.parametrize("index", range(len(SCHEMAS)))
def test_a_random_model_writes_json_of_the_schema(dense: Decoder, index: int):
    guide = Guide.json_schema(SCHEMAS[index])
    prompts = [f"JSON {i}: " for i in range(4)]
    options = {"temperature": 1.0, "seed": index, "max_new_tokens": 400}
    for result in dense.generate(prompts, guide=guide, **options):
        assert result.finish_reason == "stop" and result.stop_reason in (EOS, BOS), result.text
        assert is_valid(json.loads(result.text), SCHEMAS[index]), result.text


@pytest.mark.parametrize("index", range(0, len(SCHEMAS), 3))
def test_the_packaged_model_writes_json_of_the_schema(demo: Decoder, index: int):
    guide = Guide.json_schema(json.dumps(SCHEMAS[index]))
    for temperature in (0.0, 1.0):
        result = demo.generate("An example: ", guide=guide, temperature=temperature,
                               max_new_tokens=600, seed=3)  # fmt: skip
        assert result.finish_reason == "stop", result.text
        assert is_valid(json.loads(result.text), SCHEMAS[index]), result.text


def test_any_object(demo: Decoder):
    results = demo.generate(["{", "The object: "] * 6, guide=Guide.json_object(), temperature=1.2,
                            seed=5, max_new_tokens=120)  # fmt: skip
    whole = [result for result in results if result.finish_reason == "stop"]
    assert whole and all(isinstance(json.loads(result.text), dict) for result in whole)


@pytest.mark.parametrize(
    "pattern",
    [
        "[0-9]{3}-[0-9]{4}",
        "(yes|no)",
        "a{5}",
        "[A-Z][a-z]{0,9}",
        "(世界|é|🎉){3}",
        "x?",
        "",
        r"[0-9]{1,5}\.[0-9][0-9]?",
    ],
)
def test_regular_expressions(dense: Decoder, demo: Decoder, pattern: str):
    for decoder in (dense, demo):
        for seed in range(4):
            result = decoder.generate("?", guide=Guide.regex(pattern), temperature=1.0, seed=seed,
                                      max_new_tokens=300)  # fmt: skip
            assert result.finish_reason == "stop"
            assert re.fullmatch(pattern, result.text), result.text


def test_grammars_may_name_special_tokens(demo: Decoder):
    (end,) = demo.encode("<|end|>", add_special_tokens=False)
    guide = Guide.grammar(f'start: "a" <[{end}]> "b" <|end|> "c"')
    result = demo.generate("x", guide=guide, ignore_eos=True, max_new_tokens=20)
    assert result.text == "abc" and result.token_ids.count(end) == 2


def test_ends(dense: Decoder):
    guide = Guide.regex("ab")
    assert dense.generate("x", guide=guide).token_ids[:2] == (97, 98)
    # Without a token that could end it, it ends by itself.
    for options in ({"ignore_eos": True}, {"min_new_tokens": 9}, {"suppress_tokens": [EOS, BOS]}):
        result = dense.generate("x", guide=guide, **options)
        assert (result.token_ids, result.finish_reason) == ((97, 98), "stop"), options
        assert (result.text, result.stop_reason, result.error) == ("ab", None, None)
    nothing = dense.generate("x", guide=Guide.regex(""), ignore_eos=True)
    assert (nothing.token_ids, nothing.text, nothing.finish_reason) == ((), "", "stop")
    # A text that may go on ends where the model wants it to, and not before it may.
    result = dense.generate("x", guide=Guide.regex("a{3,}"), temperature=1.0, max_new_tokens=50,
                            logit_bias={EOS: 100.0})  # fmt: skip
    assert (result.text, result.stop_reason) == ("aaa", EOS)


def test_limits_still_cut(dense: Decoder):
    guide = Guide.regex("(abc)+")
    assert dense.generate("x", guide=guide, max_new_tokens=4, ignore_eos=True).text == "abca"
    result = dense.generate("x", guide=guide, stop="cab", max_new_tokens=50, ignore_eos=True)
    assert (result.text, result.stop_reason) == ("ab", "cab")
    result = dense.generate("x", guide=guide, stop_token_ids=[99], max_new_tokens=50)
    assert result.token_ids == (97, 98, 99) and result.stop_reason == 99


def test_log_probabilities_stay_the_models(dense: Decoder):
    guided = dense.generate("x", guide=Guide.regex("ab"), logprobs=2, ignore_eos=True)
    first = dense.generate("x", logprobs=20, max_new_tokens=1, allowed_token_ids=[97])
    assert guided.logprobs[0] == first.logprobs[0].__class__(
        token_id=97, logprob=first.logprobs[0].logprob, rank=first.logprobs[0].rank,
        top=first.logprobs[0].top[:2],
    )  # fmt: skip
    assert guided.logprobs[0].logprob < -0.01


def test_what_the_page_shows_works(capsys: pytest.CaptureFixture[str]):
    page = Path(__file__).resolve().parents[2] / "docs" / "structured.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(compile(block, page.name, "exec"), {})
    colour, answer, choice = capsys.readouterr().out.strip().rsplit("\n", 2)
    assert 0 <= json.loads(colour)["red"] <= 255
    assert answer in ("yes", "no") and choice in ("[a]", "[b]")


# In every way


def answers(decoder: Decoder, **options: Any) -> list[list[tuple[int, ...]]]:
    """Token ids of many guided requests, each alone."""
    return [
        [
            decoder.submit(f"{seed}: ", guide=guide, temperature=temperature, seed=seed,
                           max_new_tokens=60, **options).result(60).token_ids
            for seed in range(4)
        ]
        for guide in GUIDES
        for temperature in (0.0, 1.0)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def expected(dense: Decoder) -> list[list[tuple[int, ...]]]:
    return answers(dense)


@pytest.mark.parametrize("draft_tokens", ["auto", 8])
@pytest.mark.parametrize("drafts", ["ngram", "both"])
@pytest.mark.parametrize("plan", [{"attention": "full"}, TIDAL], ids=["full", "tidal"])
def test_so_are_texts_drafted_from_themselves(folder: Path, expected, plan, drafts, draft_tokens):
    way = {"verify": True, "drafts": drafts, "draft_tokens": draft_tokens}
    with Decoder(folder, **way, **plan, **OPTIONS) as decoder:
        assert answers(decoder) == expected
        result = decoder.generate(
            "1: ", guide=Guide.regex("(ab){40}"), temperature=1.0, seed=1, max_new_tokens=90
        )
        assert result.text == "ab" * 40
        assert 0 < result.verification.accepted_tokens and 0 < result.verification.ngram_tokens


@pytest.mark.parametrize("draft_tokens", ["auto", 1, 3, 8])
@pytest.mark.parametrize("token_budget", [2, 12])
def test_verified_texts_are_those_of_dense_decoding(
    folder: Path, expected, draft_tokens, token_budget
):
    tidal = TIDAL | {"token_budget": token_budget}
    with Decoder(folder, verify=True, draft_tokens=draft_tokens, **tidal, **OPTIONS) as decoder:
        assert answers(decoder) == expected
        result = decoder.generate("1: ", guide=NESTED, temperature=1.0, seed=1, max_new_tokens=60)
        # Drafts are drawn by the guide too: of those that are kept there are many.
        assert 0 < result.verification.accepted_tokens
        if draft_tokens == 3 and token_budget == 2:
            assert result.verification.accepted_tokens < result.verification.drafted_tokens


@pytest.mark.parametrize("mode", [{"attention": "full"}, TIDAL, TIDAL | {"verify": True}])
def test_requests_beside_others_are_as_alone(folder: Path, mode):
    with Decoder(folder, max_batch_size=6, **mode, **OPTIONS) as decoder:
        alone = answers(decoder)
        asked = [
            [
                decoder.submit(f"{seed}: ", guide=guide, temperature=temperature, seed=seed,
                               max_new_tokens=60)
                for seed in range(4)
            ]
            for guide in GUIDES
            for temperature in (0.0, 1.0)
        ]  # fmt: skip
        together = [[request.result(60).token_ids for request in row] for row in asked]
        assert together == alone
        assert decoder.stats()["num_waiting"] == decoder.stats()["pages_held"] == 0


def test_several_answers_to_one_prompt(dense: Decoder):
    options = {"guide": RED, "temperature": 1.0, "max_new_tokens": 60}
    first = dense.submit("A colour: ", n=5, seed=11, **options)
    texts = [choice.result(20).text for choice in first.choices]
    assert all(keeps(text, RED) for text in texts)
    alone = [dense.generate("A colour: ", seed=11 + i, **options).text for i in range(5)]
    assert texts == alone and len(set(texts)) > 1


def test_paused_requests_go_on_as_if_never_paused(folder: Path):
    guide = Guide.regex("[a-z]{1300}")
    few = {"page_size": 16, "num_pages": 132, "max_batch_size": 4, "max_seq_len": 1536}
    for mode in ({"attention": "full"}, TIDAL | {"verify": True}):
        with Decoder(folder, **mode, **(OPTIONS | few)) as decoder:
            options = {"guide": guide, "temperature": 1.0, "max_new_tokens": 1400}
            alone = [decoder.generate("A: ", seed=i, **options).token_ids for i in range(4)]
            asked = decoder.submit("A: ", n=4, seed=0, **options)  # which come at once
            assert [one.result(300).token_ids for one in asked.choices] == alone
            assert decoder.stats()["num_pauses"] > 0


def test_streams_sessions_and_chats(demo: Decoder):
    pieces = list(demo.stream("x", guide=PERSON, max_new_tokens=200))
    assert is_valid(json.loads("".join(pieces)), SCHEMAS[28]) and len(pieces) > 3
    messages = [{"role": "user", "content": "Who?"}]
    assert keeps(demo.chat(messages, guide=PERSON, max_new_tokens=200).text, PERSON)
    with demo.session() as session:
        for guide in (RED, PERSON, RED):
            result = session.generate(
                "And: ", guide=guide, temperature=1.0, seed=1, max_new_tokens=200
            )
            assert keeps(result.text, guide)
        assert keeps("".join(session.stream("x", guide=RED, temperature=1.0, seed=1)), RED)
        assert session.generate("x", max_new_tokens=3).finish_reason in ("length", "stop")


def test_corrections_do_not_disturb(folder: Path):
    with Decoder(folder, **TIDAL, correction_interval=5, **OPTIONS) as decoder:
        for guide, result in zip(GUIDES, answers(decoder)[1::2], strict=True):
            for ids in result:
                if guide is not None and ids[-1] in (EOS, BOS):
                    assert keeps(decoder.decode(ids), guide)


# What ends early


def test_a_request_that_is_cancelled(dense: Decoder):
    endless = Guide.regex("[a-z]+")
    requests = [dense.submit("x", guide=endless, max_new_tokens=400) for _ in range(20)]
    requests[0].read(5.0)
    for request in requests:
        request.cancel()
    assert {request.result().finish_reason for request in requests} <= {"abort", "stop"}
    assert dense.generate("x", guide=RED).finish_reason == "stop"
    assert dense.stats()["pages_held"] == 0


def test_a_decoder_that_is_closed_meanwhile(folder: Path):
    decoder = Decoder(folder, attention="full", **OPTIONS)
    request = decoder.submit("x", guide=Guide.regex("[a-z]+"), max_new_tokens=400)
    decoder.close()
    assert request.result(5.0).finish_reason == "abort"
    with pytest.raises(InvalidArgument, match="closed"):
        decoder.generate("x", guide=RED)
    assert_no_guide_threads()


def test_a_decoder_that_is_dropped_takes_its_thread_along(folder: Path):
    decoder = Decoder(folder, attention="full", **OPTIONS)
    assert decoder.generate("x", guide=RED).finish_reason == "stop"
    del decoder
    assert_no_guide_threads()
    gc.collect()
    # Those of this module's decoders.
    assert sum(isinstance(value, Vocabulary) for value in gc.get_objects()) <= 2


def assert_no_guide_threads() -> None:
    """Waits until there are no more than those of the decoders of this module."""
    deadline = time.monotonic() + 10
    gc.collect()
    while count_guide_threads() > 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def count_guide_threads() -> int:
    return sum(thread.name == "tidaldecode-guides" for thread in threading.enumerate())


def test_dead_ends_end_with_a_reason(dense: Decoder, tmp_path: Path):
    result = dense.generate("x", guide=Guide.regex("ab"), suppress_tokens=[98])
    assert (result.finish_reason, result.text) == ("error", "a")
    assert "guide: of the tokens that it allows after 1 new ones" in result.error
    # A model without the row of a byte that must come.
    folder = write_byte_tokenizer(write_checkpoint(tmp_path, TinyModel(vocab_size=100)))
    for mode in ({"attention": "full"}, TIDAL | {"select_layers": (1, 2), "verify": True}):
        with Decoder(folder, **mode, **OPTIONS) as decoder:
            asked = [decoder.submit([1, 2], guide=Guide.regex(p)) for p in ("ax", "bbb", "")]
            dead, other, _ = [request.result(20) for request in asked]
            assert dead.finish_reason == "error" and dead.token_ids in ((97,), ())
            assert "guide: no token of the vocabulary goes on from here" in dead.error
            assert other.token_ids == (98, 98, 98)


# What is refused


@pytest.mark.parametrize(
    ("guide", "expected"),
    [
        (Guide.regex("(a"), r"guide: regex: .*error: unclosed group; expected"),
        (Guide.regex("a(?=b)"), r"guide: regex: .*look-around"),
        (Guide.grammar("start: foo"), r"guide: grammar: at 1\(8\): unknown name.*foo"),
        (Guide.grammar(""), r"guide: grammar: "),
        (Guide.json_schema({"not": {}}), r"guide: json_schema at '/': Unimplemented keys.*not"),
        (
            Guide.json_schema({"properties": {"a": {"items": {"format": "nope"}}}}),
            r"guide: json_schema at '/properties/a/items/format': Unknown format: nope",
        ),
        (Guide.json_schema({"type": "what"}), r"guide: json_schema at '/type': .*what"),
        (Guide.json_schema({"$ref": "#/nowhere"}), r"guide: json_schema"),
    ],
)
def test_a_guide_that_cannot_be_kept_to_is_refused_at_once(dense: Decoder, guide, expected):
    for call in (dense.generate, dense.stream, dense.submit):
        with pytest.raises(InvalidArgument, match=expected):
            call("x", guide=guide)
    assert dense.stats()["num_waiting"] == 0


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Guide.json_schema("{"), "guide: json_schema: got '{', expected an object"),
        (lambda: Guide.json_schema([]), r"guide: json_schema: got \[\], expected an object"),
        (lambda: Guide.json_schema("3"), "guide: json_schema: got 3"),
        (lambda: Guide.json_schema({"a": float("nan")}), "guide: json_schema: Out of range"),
        (lambda: Guide.json_schema({"a": object()}), "guide: json_schema: got a object"),
        (lambda: Guide.json_schema("[" * 100_000), "guide: json_schema: got"),
        (lambda: Guide.regex(3), "guide: regex: got 3, expected a text"),
        (lambda: Guide.grammar("\ud800"), "guide: grammar: got the lone surrogate"),
        (lambda: Guide.regex("a" * 2_000_000), "guide: regex: got 2000000 characters"),
        (lambda: Guide("lark", "x"), "guide: got kind 'lark', expected one of 'json_schema'"),
    ],
)
def test_what_is_no_guide(make, expected):
    with pytest.raises(InvalidArgument, match=expected):
        make()


def test_the_guide_of_a_call_is_a_guide(dense: Decoder):
    for wrong in ("{}", {"type": "object"}, 3, Guide):
        with pytest.raises(InvalidArgument, match=r"guide: got .*, expected a Guide"):
            dense.generate("x", guide=wrong)


def test_a_class_of_pydantic_is_a_schema():
    class Person:
        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            return {"type": "object"}

    assert Guide.json_schema(Person) == Guide.json_object()


def test_without_the_library_it_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with (
        Decoder(folder, attention="full", **OPTIONS) as decoder,
        pytest.raises(UnsupportedError, match=r"pip install 'tidaldecode\[structured\]'"),
    ):
        decoder.generate("x", guide=RED)


def test_without_a_tokenizer_it_is_said(tmp_path: Path):
    with (
        Decoder(write_checkpoint(tmp_path, MODEL), attention="full", **OPTIONS) as decoder,
        pytest.raises(ConfigError, match="no tokenizer"),
    ):
        decoder.generate([1], guide=RED)


# How it ends

SETUP = """
from tidaldecode import Decoder, Guide
decoder = Decoder(tidaldecode.demo_model_dir(), device="cpu", attention="full", max_seq_len=4096,
                  num_threads=1)
request = decoder.submit("x", guide=Guide.regex("[a-z ]*"), max_new_tokens=4000, ignore_eos=True)
while len(request.token_ids) < 3:
    request.read(0.1)
"""


@pytest.mark.parametrize("end", ["", "decoder.close()", "del decoder", "import sys; sys.exit(0)"])
def test_the_interpreter_ends_while_a_guided_request_runs(end: str):
    began = time.monotonic()
    check_python(SETUP + end, timeout=60)
    assert time.monotonic() - began < 30


def test_a_forked_child_says_so_and_ends():
    check_python(
        SETUP
        + """
import os
child = os.fork()
if child == 0:
    try:
        decoder.generate("x", guide=Guide.regex("ab"))
    except tidaldecode.UnsupportedError:
        os._exit(0)
    os._exit(1)
assert os.waitpid(child, 0)[1] == 0
assert decoder.generate("x", guide=Guide.regex("ab")).text == "ab"
""",
        timeout=60,
    )
