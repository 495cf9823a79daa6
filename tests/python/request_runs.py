"""Runs of feature_runs.py for requests of many callers at once."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

import tidaldecode
from feature_runs import IDS, PLAN, Bench, uses
from tidaldecode import Guide
from tidaldecode.text.reasoning import THINK


@uses("Request.read", "Request.token_ids", "Request.prefill_progress", "Request.new_logprobs")
def read_a_request(bench: Bench) -> None:
    request = bench.open().submit(IDS, max_new_tokens=8, ignore_eos=True, logprobs=1)
    text, logprobs = "", []
    while request.status != "finished" or len(request.token_ids) < 8:
        text += request.read(timeout=0.05)
        logprobs += request.new_logprobs(len(logprobs))
    assert text == request.result().text
    assert tuple(logprobs) == request.result().logprobs
    assert request.prefill_progress == (len(IDS), len(IDS))
    assert tuple(request.token_ids) == request.result().token_ids


@uses("Decoder.submit", "Request", "Request.status", "Request.result", "Decoder.stats")
def submit(bench: Bench) -> None:
    decoder = bench.open()
    requests = [decoder.submit(IDS[: 5 + i], max_new_tokens=8, ignore_eos=True) for i in range(9)]
    assert all(isinstance(request, tidaldecode.Request) for request in requests)
    assert [len(request.result(timeout=60).token_ids) for request in requests] == [8] * 9
    assert {request.status for request in requests} == {"finished"}
    stats = decoder.stats()
    assert stats["generated_tokens"] == 72 and stats["num_finished"] == 9
    assert stats["pages_held"] == stats["num_waiting"] == 0


@uses("TextStream.read")
def read(bench: Bench) -> None:
    stream = bench.open().stream(IDS, max_new_tokens=8, ignore_eos=True)
    pieces = []
    while stream.result is None:
        pieces.append(stream.read(0.05))
    assert "".join(pieces) == stream.result.text and stream.read(1.0) == ""


@uses("Request.cancel")
def cancel(bench: Bench) -> None:
    request = bench.open().submit(IDS, max_new_tokens=400, ignore_eos=True)
    request.cancel()
    assert request.result().finish_reason in ("abort", "length")


@uses("async requests")
def async_requests(bench: Bench) -> None:
    async def ask(decoder: tidaldecode.Decoder) -> list[str]:
        async def pieces(request: tidaldecode.Request) -> str:
            return "".join([piece async for piece in request])

        requests = [decoder.submit(IDS, max_new_tokens=8, ignore_eos=True) for _ in range(6)]
        texts = await asyncio.gather(*[pieces(request) for request in requests[:3]])
        return texts + [result.text for result in await asyncio.gather(*requests[3:])]

    texts = asyncio.run(ask(bench.open()))
    assert len(texts) == 6 and all(texts)


@uses("Request.choices", "n", "cache_salt")
def several_answers(bench: Bench) -> None:
    with bench.open() as decoder:
        options = {"max_new_tokens": 6, "temperature": 1.0}
        first = decoder.submit(IDS, n=3, cache_salt="one", seed=5, **options)
        answers = [choice.result().token_ids for choice in first.choices]
        alone = [
            decoder.submit(IDS, cache_salt="two", seed=5 + i, **options).result() for i in range(3)
        ]
        assert len(answers) == 3
        assert bench.device == "cuda" or answers == [answer.token_ids for answer in alone]
        assert alone[1].cached_tokens > 0 or len(IDS) <= decoder.config.page_size


@uses("max_unread")
def an_unread_answer(bench: Bench) -> None:
    with bench.open(max_batch_size=1) as decoder:
        options = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}
        slow = decoder.submit(IDS, max_unread=4, **options)
        other = decoder.submit(IDS, **options).result(timeout=60)  # in the only row
        assert decoder.stats()["num_paused"] == 1
        answer = slow.result(timeout=60)
        assert len(answer.token_ids) == 12
        assert bench.device == "cuda" or answer.token_ids == other.token_ids


@uses("Guide", "guide", "guide with verify", "Guide.after_reasoning")
def guides(bench: Bench) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    kinds = [
        Guide.json_schema(schema | {"additionalProperties": False}),
        Guide.regex("(red|green){2}"),
        Guide.grammar('start: "[" ("a" | "b") "]"'),
        Guide.regex("yes").after_reasoning(THINK),
    ]
    for options in ({}, PLAN, PLAN | {"verify": True}):
        decoder = bench.open(max_batch_size=6, **options)
        asked = [(guide, seed) for guide in [*kinds, None] for seed in range(3)]
        requests = [
            decoder.submit(IDS, guide=guide, seed=seed, temperature=1.0, max_new_tokens=300)
            for guide, seed in asked
        ]
        for (guide, _), request in zip(asked, requests, strict=True):
            text = request.result(timeout=60).text
            if guide is kinds[0]:
                assert isinstance(json.loads(text)["ok"], bool)
            elif guide is kinds[1]:
                assert re.fullmatch("(red|green){2}", text)
            elif guide is kinds[2]:
                assert text in ("[a]", "[b]")
            elif guide is not None:
                assert text == "yes" or text.startswith("<think>")
        with decoder.session() as session:
            session.append(IDS)
            assert session.generate(guide=Guide.regex("(red|green){2}")).finish_reason == "stop"


@uses("a plan of a request", "verify of a request", "priority")
def own_plans(bench: Bench) -> None:
    decoder = bench.open(**PLAN)
    other = tidaldecode.PlanConfig(scored_layers=(2, 5), token_budget=40, sparse_min_context=0)
    asked = [
        {},
        {"attention": "full"},
        {"plan": other},
        {"verify": True},
        {"plan": other, "priority": -1},
        {"plan": other, "verify": True},
    ]
    prompt = IDS * 4
    requests = [decoder.submit(prompt, max_new_tokens=24, ignore_eos=True, **a) for a in asked]
    results = [request.result(timeout=60) for request in requests]
    assert [len(result.token_ids) for result in results] == [24] * 6
    assert results[0].verification is None and results[5].verification.drafted_tokens > 0
    assert results[3].verification.dense_passes > 0


@uses("drafts")
def drafts_from_the_text(bench: Bench) -> None:
    prompt, texts = IDS * 4, {}
    for drafts in ("tidal", "ngram", "both"):
        for plan in ({"attention": "full"}, PLAN):
            decoder = bench.open(verify=True, drafts=drafts, batch_invariant=True, **plan)
            options = {"max_new_tokens": 48, "ignore_eos": True, "temperature": 0}
            results = decoder.generate([prompt, IDS], **options)
            texts[drafts, len(plan)] = [result.token_ids for result in results]
            if drafts == "ngram":
                checks = [result.verification for result in results]
                assert all(each.ngram_tokens == each.drafted_tokens for each in checks)
                assert checks[0].drafted_tokens > 0
            unchecked = decoder.submit(prompt, verify=False, max_new_tokens=4).result()
            assert unchecked.verification is None
    assert len({str(text) for text in texts.values()}) == 1


@uses("logprobs", "prompt_logprobs", "TokenLogprobs")
def log_probabilities(bench: Bench) -> None:
    for options in ({}, PLAN, {**PLAN, "verify": True}):
        decoder = bench.open(**options)
        prompts = [IDS * 4, IDS[:7]]
        results = decoder.generate(
            prompts, max_new_tokens=6, ignore_eos=True, temperature=0, logprobs=3, prompt_logprobs=0
        )
        for prompt, result in zip(prompts, results, strict=True):
            assert len(result.logprobs) == 6 and len(result.prompt_logprobs) == len(prompt) - 1
            for each, token_id in zip(result.logprobs, result.token_ids, strict=True):
                assert each.token_id == token_id and each.rank == 1
                assert each.top[0] == (token_id, each.logprob) and len(each.top) == 3
            assert [each.token_id for each in result.prompt_logprobs] == prompt[1:]


@uses("prefix_cache")
def prefix_cache(bench: Bench) -> None:
    prompt = IDS * 5
    decoder = bench.open(page_size=16)
    results = [decoder.generate(prompt, max_new_tokens=4, ignore_eos=True) for _ in range(2)]
    assert [result.cached_tokens for result in results] == [0, 192]
    assert decoder.stats()["pages_cached"] == 12
    without = bench.open(page_size=16, prefix_cache=False)
    results = [without.generate(prompt, max_new_tokens=4, ignore_eos=True) for _ in range(2)]
    assert [result.cached_tokens for result in results] == [0, 0]


@uses("host_kv_gib")
def host_memory(bench: Bench) -> None:
    limits = {"page_size": 16, "num_pages": 140, "max_seq_len": 1440, "max_batch_size": 2}
    decoder = bench.open(**limits, **PLAN, host_kv_gib=0.1, prefix_cache=False)
    requests = [
        decoder.submit(IDS[:12] + [i], max_new_tokens=1400, ignore_eos=True) for i in range(2)
    ]
    assert [len(request.result().token_ids) for request in requests] == [1400] * 2
    stats = decoder.stats()
    assert stats["num_pauses"] > 0 and stats["read_tokens"] == 26 and stats["pages_on_host"] == 0


@uses("max_chunk_ms", "decode_share")
def shared_time(bench: Bench) -> None:
    for options in ({"max_chunk_ms": 0.5}, {"decode_share": 0.0}, {"decode_share": 0.9}):
        decoder = bench.open(**options)
        prompts = [IDS * (1 + i) for i in range(6)]
        results = decoder.generate(prompts, max_new_tokens=6, ignore_eos=True)
        assert [len(result.token_ids) for result in results] == [6] * 6


@uses("batch_invariant")
def batch_invariant(bench: Bench) -> None:
    prompts = [IDS[: 5 + 3 * i] for i in range(4)]
    texts = {}
    for name, plan in {"dense": {"attention": "full"}, "verified": PLAN | {"verify": True}}.items():
        decoder = bench.open(batch_invariant=True, **plan)
        assert decoder.config.batch_invariant
        for temperature in (0.0, 1.0):
            options = {"max_new_tokens": 40, "temperature": temperature, "seed": 1}
            alone = [decoder.generate(prompt, **options).token_ids for prompt in prompts]
            requests = [decoder.submit(prompt, **options) for prompt in prompts]
            assert [request.result().token_ids for request in requests] == alone
            texts[name, temperature] = alone
    assert texts["dense", 0.0] == texts["verified", 0.0]
    assert texts["dense", 1.0] == texts["verified", 1.0]
