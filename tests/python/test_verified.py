"""Verified decoding and cache correction from the package: what a user sets, gets and relies on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tidaldecode
from tidaldecode.config import DecodeConfig
from tidaldecode.errors import ConfigError, InvalidArgument
from tiny_models import TinyModel, random_prompt, write_checkpoint, write_tokenizer

MODEL = TinyModel(num_layers=5, num_q_heads=8, num_kv_heads=4, seed=31)
TIDAL = {
    "attention": "tidal",
    "select_layers": (1, 3),
    "full_layers": 1,
    "token_budget": 12,
    "sparse_min_context": 0,
}
LENGTHS = (40, 7, 97, 64, 1, 130)
# Knows few tokens, and so repeats itself.
REPEATING = TinyModel(num_layers=5, num_q_heads=8, num_kv_heads=4, vocab_size=20, seed=31)
DRAFTS = ("tidal", "ngram", "both")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("verified"), MODEL)
    return write_tokenizer(folder, MODEL.vocab_size)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [random_prompt(MODEL, n, seed=n) for n in LENGTHS]


def open_decoder(folder: Path, **options) -> tidaldecode.Decoder:
    defaults = {"device": "cpu", "dtype": "float32", "max_seq_len": 256, "num_threads": 1}
    return tidaldecode.Decoder(folder, **(defaults | options))


@pytest.fixture(scope="module")
def dense(folder: Path) -> tidaldecode.Decoder:
    return open_decoder(folder, attention="full")


def generate(decoder: tidaldecode.Decoder, prompts, **options):
    defaults = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
    return decoder.generate(prompts, **(defaults | options))


def tokens(results) -> list[list[int]]:
    return [list(result.token_ids) for result in results]


sampling = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 3, 40]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.8]),
        "seed": st.integers(0, 2**64 - 1),
        "max_new_tokens": st.integers(1, 30),
        "stop_token_ids": st.lists(st.integers(0, MODEL.vocab_size - 1), max_size=20),
    }
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    options=sampling,
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=5),
    draft_tokens=st.sampled_from(["auto", 1, 2, 5, 12]),
    token_budget=st.sampled_from([2, 8, 30]),
    granularity=st.sampled_from(["kv_head", "head", "layer"]),
)
def test_verified_tokens_are_those_of_dense_decoding(
    folder, dense, options, lengths, draft_tokens, token_budget, granularity
):
    batch = [random_prompt(MODEL, n, seed=i) for i, n in enumerate(lengths)]
    plan = TIDAL | {"token_budget": token_budget, "granularity": granularity}
    verified = open_decoder(folder, verify=True, draft_tokens=draft_tokens, **plan)
    expected = generate(dense, batch, **options)
    actual = generate(verified, batch, **options)
    for one, other in zip(actual, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
        assert one.text == other.text


@pytest.fixture(scope="module")
def repeating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("repeating"), REPEATING)
    return write_tokenizer(folder, REPEATING.vocab_size)


class TestDraftsFromTheText:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        options=sampling,
        lengths=st.lists(st.integers(1, 120), min_size=1, max_size=5),
        drafts=st.sampled_from(DRAFTS[1:]),
        draft_tokens=st.sampled_from(["auto", 1, 5, 12]),
        plan=st.sampled_from([TIDAL, TIDAL | {"token_budget": 2}, {"attention": "full"}]),
        num_pages=st.sampled_from([None, 32]),  # of 8 tokens: for one sequence of the longest
    )
    def test_tokens_are_those_of_dense_decoding(
        self, repeating, options, lengths, drafts, draft_tokens, plan, num_pages
    ):
        options["stop_token_ids"] = [token % 20 for token in options["stop_token_ids"][:1]]
        batch = [random_prompt(REPEATING, n, seed=i) for i, n in enumerate(lengths)]
        way = {"drafts": drafts, "draft_tokens": draft_tokens, "num_pages": num_pages}
        with (
            open_decoder(repeating, attention="full", max_batch_size=3) as dense,
            open_decoder(
                repeating, verify=True, max_batch_size=3, page_size=8, **way, **plan
            ) as got,
        ):
            expected = generate(dense, batch, **options)
            for _ in range(2):  # the second time the prompts are in the prefix cache
                for one, other in zip(generate(got, batch, **options), expected, strict=True):
                    assert one.token_ids == other.token_ids
                    assert (one.finish_reason, one.stop_reason) == (
                        other.finish_reason, other.stop_reason
                    )  # fmt: skip

    @pytest.mark.parametrize("plan", [TIDAL, {"attention": "full"}], ids=["tidal", "full"])
    @pytest.mark.parametrize("drafts", DRAFTS)
    def test_counts_tell_where_drafts_came_from(self, repeating, plan, drafts):
        prompts = [random_prompt(REPEATING, n, seed=n) for n in LENGTHS]
        with open_decoder(repeating, verify=True, drafts=drafts, **plan) as decoder:
            counts = [each.verification for each in generate(decoder, prompts, max_new_tokens=90)]
        if drafts == "tidal" and plan is not TIDAL:
            assert counts == [None] * len(prompts)
            return
        for each in counts:
            assert each.accepted_tokens + each.dense_passes == 89
        accepted, drafted, ngrams = (
            sum(getattr(each, name) for each in counts)
            for name in ("accepted_tokens", "drafted_tokens", "ngram_tokens")
        )
        assert 50 < accepted < drafted
        if drafts == "tidal":
            assert ngrams == 0
        elif drafts == "ngram" or plan is not TIDAL:
            assert ngrams == drafted
        else:
            assert 0 < ngrams < drafted

    def test_a_request_decides_for_itself(self, repeating):
        prompt = random_prompt(REPEATING, 60, seed=1)
        options = {"max_new_tokens": 60, "temperature": 0, "ignore_eos": True}
        with open_decoder(repeating, attention="full", drafts="ngram") as decoder:
            plain = decoder.submit(prompt, **options)
            verified = decoder.submit(prompt, verify=True, logprobs=2, **options)
            assert decoder.config.drafts == "ngram" and plain.result().verification is None
            assert verified.result().token_ids == plain.result().token_ids
            assert verified.result().verification.ngram_tokens > 0
            assert len(verified.result().logprobs) == 60
            assert decoder.stats()["num_checks"] > 0

    def test_a_dense_decoder_does_not_say_that_nothing_is_drafted(self, repeating, caplog):
        for drafts in DRAFTS:
            caplog.clear()
            open_decoder(repeating, attention="full", verify=True, drafts=drafts).close()
            assert ("nothing is drafted" in caplog.text) is (drafts == "tidal")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    correction_interval=st.integers(1, 40),
    length=st.integers(1, 120),
    new_tokens=st.integers(1, 40),
    prefill_chunk=st.sampled_from([5, 16, 256]),
)
def test_a_corrected_row_equals_the_row_alone(
    folder, prompts, correction_interval, length, new_tokens, prefill_chunk
):
    decoder = open_decoder(
        folder, correction_interval=correction_interval, prefill_chunk=prefill_chunk, **TIDAL
    )
    prompt = random_prompt(MODEL, length, seed=1)
    alone = generate(decoder, [prompt], max_new_tokens=new_tokens)
    together = generate(decoder, [prompts[2], prompt, prompts[3]], max_new_tokens=new_tokens)
    assert tokens(together)[1] == tokens(alone)[0]


def test_correction_changes_what_follows_it_only(folder, prompts):
    plain = tokens(generate(open_decoder(folder, **TIDAL), prompts))
    never = open_decoder(folder, correction_interval=0, **TIDAL)
    assert tokens(generate(never, prompts)) == plain
    late = open_decoder(folder, correction_interval=24, **TIDAL)
    assert tokens(generate(late, prompts)) == plain
    often = open_decoder(folder, correction_interval=2, **TIDAL)
    assert tokens(generate(often, prompts)) != plain


class TestCounts:
    def test_acceptance_can_be_computed(self, folder, prompts):
        decoder = open_decoder(folder, verify=True, draft_tokens=4, **TIDAL)
        for result, prompt in zip(generate(decoder, prompts), prompts, strict=True):
            counts = result.verification
            assert counts.accepted_tokens <= counts.drafted_tokens <= 4 * counts.dense_passes
            # All tokens but the first, which the prompt gives.
            assert counts.accepted_tokens + counts.dense_passes == 23
            assert counts.tokens_per_dense_pass == pytest.approx(23 / counts.dense_passes)
            if len(prompt) > 12:
                rate = counts.accepted_tokens / counts.drafted_tokens
                assert counts.acceptance_rate == pytest.approx(rate)

    def test_every_token_is_a_draft_or_was_drawn_densely(self, folder, prompts):
        """How many are drafted at a time depends on the neighbours; the tokens do not."""
        decoder = open_decoder(folder, verify=True, max_batch_size=8, **TIDAL)
        together = generate(decoder, prompts)
        for prompt, result in zip(prompts, together, strict=True):
            counts = result.verification
            assert counts.accepted_tokens + counts.dense_passes == len(result.token_ids) - 1
            assert generate(decoder, [prompt])[0].token_ids == result.token_ids

    def test_only_verified_calls_have_them(self, folder, dense, prompts):
        assert generate(dense, prompts[:1])[0].verification is None
        assert generate(open_decoder(folder, **TIDAL), prompts[:1])[0].verification is None
        nothing_to_draft = open_decoder(folder, attention="full", verify=True)
        result = generate(nothing_to_draft, prompts[:1])[0]
        assert result.verification is None
        assert tokens([result]) == tokens(generate(dense, prompts[:1]))


class TestText:
    def test_a_stop_string_ends_the_tokens_where_it_does_without(self, folder, dense, prompts):
        verified = open_decoder(folder, verify=True, draft_tokens=16, **TIDAL)
        text = generate(dense, prompts[2], max_new_tokens=60).text
        for at in range(4, len(text) - 2, 7):
            options = {"stop": text[at : at + 2], "max_new_tokens": 60}
            expected = generate(dense, prompts[2], **options)
            actual = generate(verified, prompts[2], **options)
            assert (actual.text, actual.token_ids) == (expected.text, expected.token_ids)
            assert (actual.finish_reason, actual.stop_reason) == ("stop", options["stop"])

    def test_a_stream_gives_the_pieces_of_a_dense_one(self, folder, dense, prompts):
        verified = open_decoder(folder, verify=True, draft_tokens=8, **TIDAL)
        options = {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True}
        expected = dense.stream(prompts[5], **options)
        actual = verified.stream(prompts[5], **options)
        assert list(actual) == list(expected)
        assert actual.result.verification.accepted_tokens > 0

    def test_a_stream_may_be_left_between_two_tokens_of_a_round(self, folder, prompts):
        decoder = open_decoder(folder, verify=True, draft_tokens=16, **TIDAL)
        free = decoder.num_free_pages
        stream = decoder.stream(prompts[5], max_new_tokens=40, temperature=0, ignore_eos=True)
        next(stream)
        next(stream)
        stream.close()
        assert decoder.num_free_pages == free
        assert stream.result.finish_reason == "abort"


class TestSettings:
    @pytest.mark.parametrize("verify", [True, "greedy", "sample"])
    def test_the_words_for_it(self, folder, dense, prompts, verify):
        decoder = open_decoder(folder, verify=verify, draft_tokens="auto", **TIDAL)
        assert decoder.config.verify == verify
        assert decoder.config.draft_tokens is None
        assert tokens(generate(decoder, prompts)) == tokens(generate(dense, prompts))

    def test_greedy_takes_greedy_calls_only(self, folder, prompts):
        decoder = open_decoder(folder, verify="greedy", **TIDAL)
        for call in (decoder.generate, decoder.stream):
            with pytest.raises(InvalidArgument, match="temperature: got 0.5, expected 0 with"):
                call(prompts[0], temperature=0.5)
        sampled = open_decoder(folder, verify="sample", **TIDAL)
        assert len(sampled.generate(prompts[0], temperature=0.5, max_new_tokens=3).token_ids) <= 3

    def test_correction_is_part_of_it(self, folder):
        with pytest.raises(InvalidArgument, match="correction_interval: got 8 together"):
            open_decoder(folder, verify=True, correction_interval=8, **TIDAL)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"verify": "maybe"}, "verify: got 'maybe', expected True, False, 'greedy'"),
            ({"verify": 1}, "verify: got 1"),
            ({"drafts": "text"}, "drafts: got 'text', expected one of 'tidal', 'ngram', 'both'"),
            ({"drafts": True}, "drafts: got True"),
            ({"draft_tokens": 0}, "draft_tokens: got 0"),
            ({"draft_tokens": 65}, "draft_tokens: got 65"),
            ({"draft_tokens": "few"}, "draft_tokens: got 'few'"),
            ({"correction_interval": -1}, "correction_interval: got -1"),
            ({"correction_interval": 1.5}, "correction_interval: got 1.5"),
        ],
        ids=str,
    )
    def test_bad_ones_are_named(self, options, expected):
        with pytest.raises(ConfigError, match=expected):
            DecodeConfig(**options)
