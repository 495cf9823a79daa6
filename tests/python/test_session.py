"""Sessions: conversations that stay in the cache, forks of them, and calls that are stopped."""

from __future__ import annotations

import gc
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from reference_llama import ReferenceLlama, TidalSettings
from scripted_model import BOS, EOS, SCRIPT, write_scripted_model
from tidaldecode import Decoder
from tidaldecode.errors import CapacityError, ConfigError, InvalidArgument
from tiny_models import TinyModel, random_prompt, read_checkpoint, write_checkpoint

TINY = TinyModel(num_layers=4, seed=31)
OPTIONS = {
    "device": "cpu", "max_seq_len": 256, "num_threads": 1, "page_size": 16, "prefix_cache": False,
}  # fmt: skip
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), TINY)


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    """Dense, without a tokenizer, with chunks of 32."""
    return Decoder(folder, **OPTIONS, attention="full", max_batch_size=3, prefill_chunk=32)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = write_scripted_model(tmp_path_factory.mktemp("scripted"))
    return Decoder(folder, **OPTIONS, attention="full", max_batch_size=2, prefill_chunk=32)


def prompts(*lengths: int) -> list[list[int]]:
    return [random_prompt(TINY, length, seed=length) for length in lengths]


# Turns


def test_turns_equal_one_long_prompt(decoder: Decoder):
    session, text = decoder.session(), []
    for prompt in prompts(70, 5, 33, 1):
        text += prompt
        want = decoder.generate(text, max_new_tokens=12, **GREEDY)
        result = session.generate(prompt, max_new_tokens=12, **GREEDY)
        assert result.token_ids == want.token_ids
        assert result.prompt_tokens == len(text)
        text += want.token_ids
        assert session.token_ids == text and len(session) == len(text)
    assert result.cached_tokens == len(text) - 12 - 2
    assert want.cached_tokens == 0


def test_tidal_turns_equal_the_reference(folder: Path):
    reference = ReferenceLlama(*read_checkpoint(folder))
    settings = TidalSettings((1, 3), 1, 16)
    decoder = Decoder(folder, **OPTIONS, dtype="float32", **settings.options())
    session, caches, unread = decoder.session(), None, []
    for prompt in prompts(60, 9, 40):
        result = session.generate(prompt, max_new_tokens=14, **GREEDY)
        unread += prompt
        if caches is None:
            rows, caches = reference.prefill(unread)
            logits = rows[-1]
        else:  # read densely, behind tokens that were decoded through the plan
            for token in unread:
                logits, _ = reference.step(token, caches, TidalSettings())
        want = [int(logits.argmax())]
        while len(want) < 14:
            logits, selection = reference.step(want[-1], caches, settings)
            want.append(int(logits.argmax()))
        assert list(result.token_ids) == want
        for layer, sets in selection.items():
            assert np.array_equal(decoder.selection()[layer], sets)
        unread = want[-1:]


@pytest.mark.parametrize(
    "options",
    [{}, {"correction_interval": 7}, {"verify": True}, {"verify": True, "drafts": "both"}],
    ids=["tidal", "corrected", "verified", "both"],
)
def test_turns_without_a_prompt_are_one_turn(folder: Path, options):
    plan = {"select_layers": (1, 3), "full_layers": 1, "token_budget": 16}
    decoder = Decoder(folder, **OPTIONS, **plan, **options)
    (prompt,) = prompts(60)
    want = decoder.generate(prompt, max_new_tokens=40, **GREEDY).token_ids
    session = decoder.session()
    got = session.generate(prompt, max_new_tokens=15, **GREEDY).token_ids
    got += session.generate(max_new_tokens=1, **GREEDY).token_ids
    got += session.generate(max_new_tokens=24, **GREEDY).token_ids
    assert got == want


def test_appended_prompts_are_read_at_once(decoder: Decoder):
    one, two = prompts(70, 40)
    seen: list[tuple[int, int]] = []
    session = decoder.session()
    assert session.append(one, on_prefill=lambda *at: seen.append(at))
    assert seen == [(32, 69), (64, 69), (69, 69)]
    assert session.append(np.array(two))
    result = session.generate(max_new_tokens=12, **GREEDY)
    assert result.cached_tokens == 109
    assert result.token_ids == decoder.generate(one + two, max_new_tokens=12, **GREEDY).token_ids


def test_only_the_first_text_gets_a_bos(scripted: Decoder):
    session = scripted.session()
    assert session.generate(">").text == SCRIPT
    script = [*SCRIPT.encode(), EOS]
    assert session.token_ids == [BOS, 62, *script]
    session.append("x")
    assert session.generate(">", max_new_tokens=3).text == "aé"
    assert session.token_ids == [BOS, 62, *script, *b"x>", *script[:3]]


def test_what_stopped_a_text_stays_in_the_context(scripted: Decoder):
    session = scripted.session()
    assert session.generate(">", stop="d.").text == "aé世🎉bc"
    assert session.token_ids == [BOS, 62, *"aé世🎉bcd.".encode()]
    assert session.generate().text == " STOP"


def test_a_stream_is_a_turn(scripted: Decoder):
    session = scripted.session()
    stream = session.stream(">")
    assert next(stream) == "a"
    for use in (
        lambda: session.generate("x"),
        lambda: session.stream("x"),
        lambda: session.append("x"),
        lambda: session.truncate(0),
        lambda: session.fork(),
        lambda: session.token_ids,
        lambda: len(session),
    ):
        with pytest.raises(InvalidArgument, match="session: a turn is running"):
            use()
    assert "running" in repr(session)
    assert "".join(stream) == SCRIPT[1:]
    assert stream.result.token_ids == (*SCRIPT.encode(), EOS)
    assert "of 256 tokens" in repr(session)
    with session.stream(">", stop="b") as stream:
        assert next(stream) == "a"
    assert session.token_ids[-2:] == [62, ord("a")], "closed where it was"
    assert stream.result.finish_reason == "abort"


# Forks


def test_forks_go_their_own_ways_and_share_pages(decoder: Decoder):
    start, *ways = prompts(100, 20, 33, 7)
    all_pages = decoder.num_free_pages
    session = decoder.session()
    session.append(start)
    assert decoder.num_free_pages == all_pages - 7
    forks = [session.fork() for _ in ways]
    assert decoder.num_free_pages == all_pages - 7
    for fork, way in zip(forks, ways, strict=True):
        result = fork.generate(way, max_new_tokens=9, **GREEDY)
        assert result.cached_tokens == 99
        want = decoder.generate(start + way, max_new_tokens=9, **GREEDY)
        assert result.token_ids == want.token_ids
    assert session.token_ids == start
    # Six pages of 16 belong to all; 129, 142 and 116 tokens need 3, 3 and 2 more.
    assert decoder.num_free_pages == all_pages - 7 - 3 - 3 - 2
    session.close()
    assert decoder.num_free_pages == all_pages - 6 - 3 - 3 - 2
    del forks, fork
    gc.collect()
    assert decoder.num_free_pages == all_pages


def test_a_dropped_session_gives_its_pages_back(decoder: Decoder):
    free = decoder.num_free_pages
    session = decoder.session()
    session.append(prompts(100)[0])
    fork = session.fork()
    del session
    gc.collect()
    assert decoder.num_free_pages == free - 7, "the fork's"
    del fork
    gc.collect()
    assert decoder.num_free_pages == free


def test_truncated_sessions_go_on_from_there(decoder: Decoder):
    one, two = prompts(70, 40)
    session = decoder.session()
    session.generate(one, max_new_tokens=12, **GREEDY)
    session.truncate(50)
    assert session.token_ids == one[:50]
    want = decoder.generate(one[:50] + two, max_new_tokens=12, **GREEDY).token_ids
    assert session.generate(two, max_new_tokens=12, **GREEDY).token_ids == want
    with pytest.raises(InvalidArgument, match="length: got 103, expected 0 to 102"):
        session.truncate(103)
    with pytest.raises(InvalidArgument, match="length: got -1"):
        session.truncate(-1)


# Chat


def test_chat_reads_only_what_is_new(scripted: Decoder):
    session = scripted.session()
    messages = [{"role": "user", "content": "hi"}]
    first = session.chat(messages)
    assert first.text == SCRIPT and first.cached_tokens == 0
    messages += [{"role": "assistant", "content": SCRIPT}, {"role": "user", "content": "more"}]
    second = session.chat(messages)
    assert second.text == SCRIPT
    rendered = scripted.render_chat(messages)
    assert second.prompt_tokens == len(rendered)
    # The template has no ">" behind an answer's beginning: that is where the two part.
    assert second.cached_tokens == len(scripted.render_chat(messages[:1])) - 1
    assert session.token_ids == rendered + list(second.token_ids)
    again = session.chat(messages)
    assert again.text == SCRIPT and again.cached_tokens == len(rendered) - 1
    other = session.chat([{"role": "user", "content": "ho"}])
    assert other.cached_tokens == len(rendered[: rendered.index(ord("i"))])
    assert "".join(session.chat_stream(messages)) == SCRIPT
    assert session.token_ids == rendered + list(second.token_ids)


def test_chat_equals_the_decoders_chat(scripted: Decoder):
    session = scripted.session()
    messages = []
    for content in ("one", "two", "three"):
        messages.append({"role": "user", "content": content})
        result = session.chat(messages)
        assert result.token_ids == scripted.chat(messages).token_ids
        messages.append({"role": "assistant", "content": result.text})


def test_chat_needs_a_template(decoder: Decoder):
    with pytest.raises(ConfigError):
        decoder.session().chat([{"role": "user", "content": "x"}])


# What is refused


def test_what_does_not_fit_leaves_the_session_as_it_was(folder: Path):
    decoder = Decoder(folder, **OPTIONS, attention="full", max_batch_size=1, num_pages=10)
    one, long, longer = prompts(70, 90, 200)
    session = decoder.session()
    session.generate(one, max_new_tokens=10, **GREEDY)
    state = session.token_ids, decoder.num_free_pages
    for use in (
        lambda: session.generate(longer, max_new_tokens=10),
        lambda: session.generate(long, max_new_tokens=10),
        lambda: session.stream(long, max_new_tokens=10),
        lambda: session.append(long),
        lambda: session.generate(max_new_tokens=100),
        lambda: decoder.session(max_seq_len=257),
    ):
        with pytest.raises((CapacityError, ConfigError), match="have|at most|no tokenizer"):
            use()
        assert (session.token_ids, decoder.num_free_pages) == state
    # A default length shrinks to the room there is: ten pages of 16.
    assert len(session.generate(**GREEDY).token_ids) == 10 * 16 - 80
    small = decoder.session(max_seq_len=30)
    assert small.max_seq_len == 30
    with pytest.raises(CapacityError, match="31 positions, have max_seq_len 30"):
        small.generate([1] * 30, max_new_tokens=1)


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (lambda s: s.generate(), "it has no tokens to generate after"),
        (lambda s: s.append([]), "got an empty list"),
        (lambda s: s.append([320]), "got 320"),
        (lambda s: s.generate([[1], [2]]), "got 2 prompts, expected one"),
        (lambda s: s.generate([1], max_new_tokens=0), "max_new_tokens: got 0"),
        (lambda s: s.generate([1], should_stop=5), "should_stop: got 5, expected a function"),
        (lambda s: s.append([1], on_prefill="x"), "on_prefill: got 'x'"),
    ],
    ids=range(7),
)
def test_bad_calls_are_named(decoder: Decoder, use, expected):
    session = decoder.session()
    with pytest.raises(InvalidArgument, match=expected):
        use(session)
    assert len(session) == 0
    with pytest.raises(InvalidArgument, match="max_seq_len: got 0"):
        decoder.session(max_seq_len=0)
    with pytest.raises(TypeError, match="max_tokens"):
        session.generate([1], max_tokens=3)


def test_closed_sessions_say_so(tmp_path: Path):
    folder = write_scripted_model(tmp_path)
    decoder = Decoder(folder, **OPTIONS, attention="full", max_batch_size=2)
    free = decoder.num_free_pages
    with decoder.session() as session:
        stream = session.stream(">")
        next(stream)
    assert decoder.num_free_pages == free
    assert stream.result.finish_reason == "abort"
    session.close()
    assert repr(session) == "Session(closed)"
    other = decoder.session()
    fork = other.fork()
    running = other.stream(">")
    orphan = decoder.session().stream(">")
    decoder.close()
    assert running.result.finish_reason == orphan.result.finish_reason == "abort"
    for closed in (session, other, fork):
        for use in (
            lambda closed=closed: closed.generate(">"),
            lambda closed=closed: closed.stream(">"),
            lambda closed=closed: closed.append(">"),
            lambda closed=closed: closed.chat([]),
            lambda closed=closed: closed.fork(),
            lambda closed=closed: closed.truncate(0),
            lambda closed=closed: closed.token_ids,
        ):
            with pytest.raises(InvalidArgument, match="session: it is closed"):
                use()


def test_a_session_outlives_a_dropped_decoder(tmp_path: Path):
    folder = write_scripted_model(tmp_path)
    session = Decoder(folder, **OPTIONS, attention="full", max_batch_size=1).session()
    gc.collect()
    assert session.generate(">").text == SCRIPT
    assert session.fork().generate(">").text == SCRIPT


def test_threads_take_turns(decoder: Decoder):
    shared, (prompt,) = decoder.session(), prompts(40)
    want = decoder.generate(prompt, max_new_tokens=10, **GREEDY).token_ids
    results: list[tuple[int, ...]] = []

    def work() -> None:
        for _ in range(3):
            own = decoder.session()
            own.append(prompt)
            results.append(own.generate(max_new_tokens=10, **GREEDY).token_ids)
            shared.generate([7], max_new_tokens=2, **GREEDY)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [want] * 12
    assert len(shared) == 12 * 3


# Calls that are stopped


class StopAfter:
    """A should_stop that says so from its `count`-th question on."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_call_stops_within_a_chunk(decoder: Decoder):
    free = decoder.num_free_pages
    (prompt,) = prompts(100)
    want = decoder.generate(prompt, max_new_tokens=20, **GREEDY).token_ids
    for asked, num_tokens in ((0, 0), (1, 0), (3, 0), (4, 1), (9, 6)):
        seen: list[int] = []
        result = decoder.generate(
            prompt, max_new_tokens=20, should_stop=StopAfter(asked), **GREEDY,
            on_prefill=lambda done, total, seen=seen: seen.append(done),
        )  # fmt: skip
        assert result.finish_reason == "abort" and result.stop_reason is None
        assert result.token_ids == want[:num_tokens]
        assert seen == [32, 64, 96, 100][:asked]
        assert decoder.num_free_pages == free
    result = decoder.generate(prompt, max_new_tokens=4, should_stop=lambda: False, **GREEDY)
    assert result.finish_reason == "length"


def test_a_stopped_batch_ends_where_it_is(decoder: Decoder):
    batch = prompts(20, 21, 22, 23, 24, 25, 26)  # of three rows
    want = decoder.generate(batch, max_new_tokens=10, **GREEDY)
    for asked in (0, 1, 5, 20):
        got = decoder.generate(batch, max_new_tokens=10, should_stop=StopAfter(asked), **GREEDY)
        assert {r.finish_reason for r in got[-3:]} == {"abort"}
        for one, two in zip(got, want, strict=True):
            assert one.token_ids == two.token_ids[: len(one.token_ids)]
            assert len(one.token_ids) <= asked
            assert (one.finish_reason == "length") == (len(one.token_ids) == 10)


def test_a_stopped_stream_ends_with_what_it_has(scripted: Decoder):
    free = scripted.num_free_pages
    for asked, text in ((0, ""), (1, "a"), (3, "aé"), (99, SCRIPT)):
        stream = scripted.stream(">", should_stop=StopAfter(asked))
        assert "".join(stream) == text == stream.result.text
        assert stream.result.finish_reason == ("stop" if asked == 99 else "abort")
        assert scripted.num_free_pages == free
    result = scripted.chat([{"role": "user", "content": "x"}], should_stop=StopAfter(2))
    assert result.finish_reason == "abort"


def test_append_says_whether_its_tokens_stay(decoder: Decoder):
    for prompt in ([5], [5, 6, 7], prompts(100)[0]):
        for asked in range(8):
            session = decoder.session()
            stays = session.append(prompt, should_stop=StopAfter(asked))
            assert len(session) == (len(prompt) if stays else 0)


def test_an_answer_to_should_stop_may_be_an_error(decoder: Decoder):
    free = decoder.num_free_pages

    def fail() -> bool:
        raise RuntimeError("no answer")

    with pytest.raises(RuntimeError, match="no answer"):
        decoder.generate([1, 2], should_stop=fail)
    with pytest.raises(RuntimeError, match="no answer"):
        decoder.session().append([1, 2], should_stop=fail)
    gc.collect()
    assert decoder.num_free_pages == free


def test_a_stopped_turn_leaves_a_session_that_goes_on(decoder: Decoder):
    start, long = prompts(50, 100)
    session = decoder.session()
    session.generate(start, max_new_tokens=5, **GREEDY)
    text, free = session.token_ids, decoder.num_free_pages
    # While it reads: nothing has happened.
    result = session.generate(long, should_stop=StopAfter(2), **GREEDY)
    assert (result.finish_reason, result.token_ids) == ("abort", ())
    assert (session.token_ids, decoder.num_free_pages) == (text, free)
    assert not session.append(long, should_stop=StopAfter(2))
    assert (session.token_ids, decoder.num_free_pages) == (text, free)
    # While it decodes: what was said stays.
    result = session.generate(long, should_stop=StopAfter(8), max_new_tokens=20, **GREEDY)
    assert result.finish_reason == "abort" and 0 < len(result.token_ids) < 20
    assert session.token_ids == text + long + list(result.token_ids)
    session.truncate(len(text))
    assert (session.token_ids, decoder.num_free_pages) == (text, free)
    want = decoder.generate(text + [1, 2], max_new_tokens=9, **GREEDY).token_ids
    assert session.generate([1, 2], max_new_tokens=9, **GREEDY).token_ids == want


@pytest.mark.parametrize("chunks", [1, 3])
def test_ctrl_c_while_a_session_reads_leaves_it_as_it_was(decoder: Decoder, chunks):
    start, long = prompts(50, 100)
    session = decoder.session()
    session.generate(start, max_new_tokens=5, **GREEDY)
    text, free = session.token_ids, decoder.num_free_pages

    def interrupt(done: int, total: int) -> None:
        if done > 32 * (chunks - 1):
            signal.raise_signal(signal.SIGINT)

    for use in (session.append, session.generate):
        with pytest.raises(KeyboardInterrupt):
            use(long, on_prefill=interrupt)
        assert (session.token_ids, decoder.num_free_pages) == (text, free)
    want = decoder.generate(text + [1, 2], max_new_tokens=9, **GREEDY).token_ids
    assert session.generate([1, 2], max_new_tokens=9, **GREEDY).token_ids == want


def test_another_conversation_has_the_room_of_the_one_before(demo_model: Path):
    """A default max_new_tokens shrinks to the room there is: the session's own pages are room."""
    decoder = Decoder(demo_model, **OPTIONS, attention="full", max_batch_size=1, num_pages=16)
    short = [{"role": "user", "content": "hello"}]
    with decoder.session() as session:
        expected = session.chat(short, ignore_eos=True).token_ids
    with decoder.session() as session:
        session.chat([{"role": "user", "content": "hello " * 60}], ignore_eos=True)
        assert len(session) == 256
        assert session.chat(short, ignore_eos=True).token_ids == expected
        assert len(session) == 256
