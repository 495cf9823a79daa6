"""Text that appears while it is generated: whole characters, and never part of a stop string."""

from __future__ import annotations

import random
from functools import partial
from types import SimpleNamespace

import pytest

from scripted_model import EOS, SCRIPT, write_scripted_model
from tidaldecode import Decoder
from tidaldecode.checkpoint.generation_defaults import GenerationDefaults
from tidaldecode.errors import InvalidArgument
from tidaldecode.sampling import check_sampling
from tidaldecode.text.detokenizer import IncrementalDetokenizer, StopStringFilter, TextAssembler


def decode_bytes(ids: list[int]) -> str:
    """A byte-level tokenizer: one id per byte, 256 and above are special."""
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def decode_with_fallback(ids: list[int]) -> str:
    """Like Llama 2's decoder: a run of byte tokens with one bad byte shows every byte as U+FFFD."""
    data = bytes(ids)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(chr(b) if b < 128 else "\ufffd" for b in data)


def decode_words(ids: list[int]) -> str:
    """Like Llama 2's decoder in another way: a word has a space in front unless it is the first."""
    return " ".join(f"w{i}" for i in ids)


TEXTS = [
    "plain",
    "é",
    "aé世🎉b",
    "🎉🎉🎉",
    "mixed 世界 and é!",
    "ends with a real \ufffd",
    "\ufffd\ufffdx",
]


@pytest.mark.parametrize("decode", [decode_bytes, decode_with_fallback])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_split_no_character(text, decode):
    detokenizer = IncrementalDetokenizer(decode, list(b"prompt"))
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert pieces[-1] == ""
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte():
    detokenizer = IncrementalDetokenizer(decode_bytes)
    assert [detokenizer.push(b) for b in "é🎉".encode()] == ["", "é", "", "", "", "🎉"]


def test_an_unfinished_character_is_shown_at_the_end_as_such():
    detokenizer = IncrementalDetokenizer(decode_bytes)
    assert [detokenizer.push(b) for b in b"a\xf0\x9f"] == ["a", "", ""]
    assert detokenizer.finish() == "\ufffd"


def test_bytes_that_never_become_text_do_not_hold_the_rest_back():
    detokenizer = IncrementalDetokenizer(decode_bytes)
    pieces = [detokenizer.push(0xFF) for _ in range(200)]
    assert len("".join(pieces)) > 100
    pieces += [detokenizer.push(b) for b in b"ok"] + [detokenizer.finish()]
    assert "".join(pieces) == "\ufffd" * 200 + "ok"


def test_the_prompt_decides_about_the_space_in_front():
    detokenizer = IncrementalDetokenizer(decode_words, [1, 2])
    assert [detokenizer.push(i) for i in (3, 4)] == [" w3", " w4"]
    assert IncrementalDetokenizer(decode_words).push(3) == "w3"


def test_special_tokens_are_no_context():
    def decode(ids: list[int]) -> str:
        return decode_words([i for i in ids if i < 100])

    detokenizer = IncrementalDetokenizer(decode, [1])
    assert [detokenizer.push(i) for i in (2, 100, 101, 3)] == [" w2", "", "", " w3"]


def test_random_text_in_random_tokens_survives():
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("ab é世🎉\n") for _ in range(rng.randrange(1, 20)))
        data, cuts = text.encode(), []
        while sum(cuts) < len(data):
            cuts.append(rng.randrange(1, 4))
        tokens, start = [], 0
        for cut in cuts:
            tokens.append(data[start : start + cut])
            start += cut
        detokenizer = IncrementalDetokenizer(
            lambda ids, tokens=tokens: b"".join(tokens[i] for i in ids).decode(errors="replace")
        )
        pieces = [detokenizer.push(i) for i in range(len(tokens))] + [detokenizer.finish()]
        assert "".join(pieces) == text


def run_filter(stop: list[str], pieces: list[str]) -> tuple[str, str | None]:
    filter_ = StopStringFilter(stop)
    shown = "".join(filter_.push(piece) for piece in pieces)
    return shown + filter_.finish(), filter_.matched


@pytest.mark.parametrize(
    ("stop", "text", "shown", "matched"),
    [
        (["STOP"], "go STOP no", "go ", "STOP"),
        (["STOP"], "STO STOOP STOP", "STO STOOP ", "STOP"),
        (["STOP"], "no end STO", "no end STO", None),
        (["aab"], "aaab", "a", "aab"),
        (["abab"], "abaabab", "aba", "abab"),
        (["bc", "abcd"], "xabcd", "xa", "bc"),
        (["cd", "bcd"], "abcd", "a", "bcd"),
        (["世界"], "你好世界", "你好", "世界"),
        (["\n\n"], "a\nb\n\nc", "a\nb", "\n\n"),
        (["x"], "", "", None),
        ([], "all", "all", None),
        (["x"], "x", "", "x"),
    ],
)
def test_stop_strings_cut_exactly_however_the_text_is_cut(stop, text, shown, matched):
    assert run_filter(stop, [text]) == (shown, matched)
    assert run_filter(stop, list(text)) == (shown, matched)
    rng = random.Random(1)
    for _ in range(20):
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(3))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert run_filter(stop, pieces) == (shown, matched)


def test_no_text_is_shown_that_a_stop_string_takes_back():
    filter_ = StopStringFilter(["STOP"])
    assert [filter_.push(c) for c in "a STAR"] == ["a", " ", "", "", "STA", "R"]


def assembler_of(decode, stop, **settings) -> TextAssembler:
    """An assembler for one sequence, with a tokenizer that has this decode function."""

    def detokenize(rows: list[dict]) -> list[dict]:
        answers = []
        for row in rows:
            own = IncrementalDetokenizer(partial(decode, skips=row["skips"]), row["prompt"])
            if row["state"] is not None:
                own.state = row["state"]
            pieces = [own.push(token_id) for token_id in row["ids"]]
            pieces += [own.finish()] if row["ends"] else []
            answers.append({"pieces": pieces, "state": own.state})
        return answers

    checked = check_sampling(
        defaults=GenerationDefaults(),
        eos_token_ids=(),
        vocab_size=1000,
        encode_word=lambda word: [],
        stop=stop,
        **settings,
    )
    source = SimpleNamespace(
        detokenize=detokenize, special_tokens=["<end>", "<x>"], joins_bytes=False
    )
    return TextAssembler(source, [[]], checked)


def assemble(decode, stop, ids, **settings) -> tuple[str, str | None]:
    """The text of a sequence, token by token."""
    assembler = assembler_of(decode, stop, **settings)
    shown = [assembler.push([(0, token_id)]).get(0, "") for token_id in ids]
    shown.append(assembler.finish({0: []}).get(0, ""))
    assert "".join(shown) == assembler.text(0)
    return assembler.text(0), assembler.matched_stop(0)


def decode_marked(ids: list[int], skips: bool) -> str:
    """A byte-level tokenizer where 300 is the special token <end> and 301 is <x>."""
    parts = [b"<end>" if i == 300 else b"<x>" if i == 301 else bytes([i]) for i in ids]
    kept = [part for part, i in zip(parts, ids, strict=True) if i < 256 or not skips]
    return b"".join(kept).decode("utf-8", errors="replace")


def test_a_stop_string_that_ends_in_a_held_back_character_is_found_at_the_end():
    assert assemble(decode_marked, ["\ufffd"], b"a\xf0") == ("a", "\ufffd")


@pytest.mark.parametrize(
    ("stop", "ids", "text", "matched"),
    [
        ("<end>", [*b"ab", 300, *b"cd"], "ab", "<end>"),
        ("b<end>", [*b"ab", 300, *b"cd"], "a", "b<end>"),
        ("b<end>c", [*b"ab", 300, *b"cd"], "a", "b<end>c"),
        ("<end>c", [*b"ab", 300, *b"dd", 300, *b"cx"], "abdd", "<end>c"),
        ("<end>c", [*b"ab", 301, 300, *b"d"], "abd", None),
        ("<end>", [*"é世🎉".encode(), 301, 300], "é世🎉", "<end>"),
        ("<x>c", [195, 301, *b"de", 301, *b"cf"], "\ufffdde", "<x>c"),
        (["<end>", "b"], [*b"ab", 300], "a", "b"),
        ("nd>", [*b"ab", 300, *b"cd"], "abcd", None),
        ("<end>", b"a<end>b", "a", "<end>"),
    ],
)
def test_a_stop_string_with_a_special_token_stops_and_shows_none(stop, ids, text, matched):
    assert assemble(decode_marked, stop, ids) == (text, matched)


@pytest.mark.parametrize(("stop", "count"), [("b", 2), ("<end>", 3), ("b<end>c", 4), ("x", None)])
def test_tokens_behind_a_stop_string_that_come_with_it_are_not_counted(stop, count):
    ids = [*b"ab", 300, *b"cd"]
    for first in range(len(ids) + 1):
        assembler = assembler_of(decode_marked, stop)
        assembler.push((0, token_id) for token_id in ids[:first])
        assembler.finish({0: ids[first:]})
        assert assembler.tokens_to_stop(0) == count


def test_what_ended_a_text_is_kept_where_it_is_wanted():
    keep = {"include_stop_str_in_output": True}
    assert assemble(decode_marked, "b", b"abc", **keep) == ("ab", "b")
    assert assemble(decode_marked, "<end>", [97, 301, 300, 98], **keep) == ("a<end>", "<end>")
    shown = {"skip_special_tokens": False}
    assert assemble(decode_marked, "<end>", [97, 301, 300], **shown) == ("a<x>", "<end>")
    both = assemble(decode_marked, "<end>", [97, 301, 300], **shown, **keep)
    assert both == ("a<x><end>", "<end>")
    ended = assemble(decode_marked, None, [97, 300], stop_token_ids=[300], **shown)
    assert ended == ("a", None)
    kept = assemble(decode_marked, None, [97, 300], stop_token_ids=[300], **shown, **keep)
    assert kept == ("a<end>", None)


# With the engine


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = write_scripted_model(tmp_path_factory.mktemp("scripted"))
    return Decoder(
        folder, device="cpu", attention="full", max_seq_len=64, max_batch_size=2, num_threads=1
    )


def test_a_stream_gives_whole_characters_and_then_the_result(decoder: Decoder):
    stream = decoder.stream(">")
    assert stream.result is None
    assert list(stream) == list(SCRIPT)
    assert stream.result is not None
    assert stream.result == _without_timings(decoder.generate(">"), stream.result)
    assert stream.result.text == SCRIPT
    assert (stream.result.finish_reason, stream.result.stop_reason) == ("stop", EOS)
    assert tuple(stream.token_ids) == stream.result.token_ids


def _without_timings(result, other):
    import dataclasses

    return dataclasses.replace(result, timings=other.timings)


@pytest.mark.parametrize("stop", ["STOP", ".", "🎉b", ["zzz", "d. S"], "a"])
def test_a_stopped_stream_leaks_nothing_and_equals_generate(decoder: Decoder, stop):
    stream = decoder.stream(">", stop=stop)
    text = "".join(stream)
    first = min(SCRIPT.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in SCRIPT)
    assert text == SCRIPT[:first]
    result = decoder.generate(">", stop=stop)
    for outcome in (stream.result, result):
        assert outcome.text == text
        assert outcome.finish_reason == "stop"
        assert outcome.stop_reason in ([stop] if isinstance(stop, str) else stop)
    assert stream.result.token_ids == result.token_ids
    assert EOS not in result.token_ids


def test_a_text_cut_by_length_ends_with_the_bytes_it_has(decoder: Decoder):
    stream = decoder.stream(">", max_new_tokens=2)
    assert list(stream) == ["a", "\ufffd"]
    assert stream.result.finish_reason == "length"
    assert decoder.generate(">", max_new_tokens=2).text == "a\ufffd"


def test_closing_a_stream_frees_its_pages(decoder: Decoder):
    free = decoder._core.num_free_pages
    stream = decoder.stream(">")
    assert next(stream) == "a"
    stream.close()
    assert decoder._core.num_free_pages == free
    assert stream.result.finish_reason == "abort"
    assert stream.result.text == "a"
    assert list(stream) == []


def test_a_stream_frees_its_pages_however_it_is_left(decoder: Decoder):
    free = decoder._core.num_free_pages
    with decoder.stream(">") as stream:
        next(stream)
    assert decoder._core.num_free_pages == free
    decoder.stream(">")  # never read, dropped at once
    assert decoder._core.num_free_pages == free
    for _ in decoder.stream(">"):
        break
    assert decoder._core.num_free_pages == free


def test_two_streams_at_once_do_not_disturb_each_other(decoder: Decoder):
    one, two = decoder.stream(">"), decoder.stream("hello>")
    pieces = [piece for pair in zip(one, two, strict=True) for piece in pair]
    assert "".join(pieces[::2]) == "".join(pieces[1::2]) == SCRIPT


def test_more_streams_than_rows_wait_in_line(decoder: Decoder):
    streams = [decoder.stream(">") for _ in range(7)]
    assert ["".join(stream) for stream in reversed(streams)] == [SCRIPT] * 7


def test_a_stream_takes_one_prompt(decoder: Decoder):
    with pytest.raises(InvalidArgument, match="got 2 prompts, expected one"):
        decoder.stream(["a", "b"])


def test_prefill_progress_reaches_the_end(decoder: Decoder):
    seen: list[tuple[int, int]] = []
    list(decoder.stream([62] * 40, on_prefill=lambda *p: seen.append(p), max_new_tokens=2))
    assert seen[-1] == (40, 40)
    seen.clear()
    decoder.generate([[62] * 10, [62] * 20], on_prefill=lambda *p: seen.append(p))
    assert seen[-1] == (30, 30)
    assert seen.count((30, 30)) == 1


def test_an_error_in_a_callback_ends_the_call_and_frees_its_pages(decoder: Decoder):
    free = decoder._core.num_free_pages

    def fail(done: int, total: int) -> None:
        raise RuntimeError("the reader has gone")

    with pytest.raises(RuntimeError, match="has gone"):
        decoder.generate(">", on_prefill=fail)
    with pytest.raises(RuntimeError, match="has gone"):
        list(decoder.stream(">", on_prefill=fail))
    assert decoder._core.num_free_pages == free
    assert decoder.generate(">").text == SCRIPT
