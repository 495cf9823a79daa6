"""What the server's answers hold, field by field, beside what the decoder itself says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")

import httpx  # noqa: E402

from scripted_model import write_byte_tokenizer, write_scripted_model  # noqa: E402
from serving import Served, events_of, serving  # noqa: E402
from tidaldecode.server.bodies import CompletionBody, read_body  # noqa: E402
from tidaldecode.server.errors import ApiError  # noqa: E402
from tiny_models import TinyModel, write_checkpoint  # noqa: E402

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXT = "The sky over the harbour was"
MESSAGES = [{"role": "user", "content": TEXT}]
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def served(demo_model: Path) -> Iterator[Served]:
    with serving(demo_model, engine={"sparse_min_context": 0, "token_budget": 24}) as served:
        yield served


def complete(served: Served, **body: Any) -> dict[str, Any]:
    response = served.post(COMPLETIONS, {"prompt": TEXT} | GREEDY | body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(served: Served, route: str, **body: Any) -> list[dict[str, Any]]:
    events = events_of(served.post(route, GREEDY | {"stream": True} | body).text)
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


SETTINGS: dict[str, dict[str, Any]] = {
    "sampled": {"temperature": 0.9, "seed": 7, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 1.0, "repetition_penalty": 1.3},
    "bias": {"logit_bias": {"300": 30}},
    "bans": {"allowed_token_ids": [*range(300, 320)], "no_repeat_ngram_size": 1},
    "dense": {"attention": "full"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_reach_the_engine(served: Served, name: str):
    settings = SETTINGS[name]
    answer = complete(served, max_tokens=8, return_token_ids=True, **settings)
    request = served.decoder.submit(TEXT, max_new_tokens=8, **(GREEDY | settings))
    expected = request.result()
    assert answer["choices"][0]["token_ids"] == list(expected.token_ids)
    assert answer["choices"][0]["text"] == expected.text
    assert answer["choices"][0]["prompt_token_ids"] == served.decoder.encode(TEXT)


def test_n_answers_have_seeds_of_their_own(served: Served):
    answer = complete(served, max_tokens=8, n=3, temperature=1.0, seed=5)
    alone = [complete(served, max_tokens=8, temperature=1.0, seed=5 + i) for i in range(3)]
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [each["choices"][0]["text"] for each in alone] and len(set(texts)) == 3
    assert answer["usage"]["prompt_tokens"] == len(served.decoder.encode(TEXT))


@pytest.mark.parametrize("keeps", [False, True])
def test_stop_strings(served: Served, keeps: bool):
    whole = complete(served, max_tokens=30)["choices"][0]["text"]
    stop = whole[10:13]
    expected = whole[: whole.find(stop) + (len(stop) if keeps else 0)]
    body = {"max_tokens": 30, "stop": [stop], "include_stop_str_in_output": keeps}
    choice = complete(served, **body)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
    assert choice["stop_reason"] == stop
    chunks = stream(served, COMPLETIONS, prompt=TEXT, **body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"][0]["stop_reason"] == stop


def test_stop_token_ids_and_min_tokens(served: Served):
    ids = complete(served, max_tokens=12, return_token_ids=True)["choices"][0]["token_ids"]
    choice = complete(served, max_tokens=12, stop_token_ids=[ids[3]])["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == ids[3]
    later = complete(
        served, max_tokens=12, stop_token_ids=[ids[3]], min_tokens=9, return_token_ids=True
    )
    assert len(later["choices"][0]["token_ids"]) >= 9


def test_completion_logprobs_and_echo(served: Served):
    ids = served.decoder.encode(TEXT)
    expected = served.decoder.generate(
        ids, max_new_tokens=4, logprobs=2, prompt_logprobs=2, **GREEDY
    )
    choice = complete(served, max_tokens=4, logprobs=2, echo=True)["choices"][0]
    found = choice["logprobs"]
    assert choice["text"] == TEXT + expected.text
    scored = [*expected.prompt_logprobs, *expected.logprobs]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx([each.logprob for each in scored])
    assert "".join(found["tokens"][1:]) == TEXT + expected.text  # the first is BOS
    assert len(found["text_offset"]) == len(ids) + 4
    for each, top in zip(scored, found["top_logprobs"][1:], strict=True):
        assert len(top) in (2, 3) and max(top.values()) == pytest.approx(each.top[0][1])


@pytest.mark.parametrize("stream_it", [False, True])
@pytest.mark.parametrize("skips", [False, True])
def test_text_offsets_are_characters_of_the_text(served: Served, stream_it: bool, skips: bool):
    prompt = "é🎉 世 <|end|>The sky"
    for given in (prompt, served.decoder.encode(prompt)):
        body = {"prompt": given, "max_tokens": 9, "logprobs": 0, "echo": True, "seed": 4}
        body |= {"skip_special_tokens": skips, "allowed_token_ids": [6, 300, 301]}
        body |= {"temperature": 1, "logit_bias": {"6": 5}}
        if stream_it:
            chunks = [chunk["choices"][0] for chunk in stream(served, COMPLETIONS, **body)]
        else:
            chunks = [complete(served, **body)["choices"][0]]
        text = "".join(chunk["text"] for chunk in chunks)
        lists = [(chunk["logprobs"] or {}) for chunk in chunks]
        names = [name for each in lists for name in each.get("tokens", [])]
        offsets = [offset for each in lists for offset in each.get("text_offset", [])]
        assert "<|end|>" in names[-9:] and names[1].startswith("bytes:")
        for name, offset, end in zip(names, offsets, [*offsets[1:], len(text)], strict=True):
            if name.startswith("bytes:"):
                continue
            assert text[offset:end] == (name if text.startswith(name, offset) else "")
        assert offsets == sorted(offsets) and offsets[-1] <= len(text)


def test_scoring_alone(served: Served):
    """lm_eval's loglikelihood: token ids, echo, and one token or none beside."""
    ids = served.decoder.encode(TEXT)
    one = complete(served, prompt=[ids, ids[:4]], max_tokens=1, logprobs=1, echo=True)
    none = complete(served, prompt=[ids, ids[:4]], max_tokens=0, logprobs=1, echo=True)
    for full, bare, prompt in zip(one["choices"], none["choices"], (ids, ids[:4]), strict=True):
        assert len(bare["logprobs"]["tokens"]) == len(prompt)
        assert full["logprobs"]["token_logprobs"][:-1] == bare["logprobs"]["token_logprobs"]
        assert bare["text"] == served.decoder.decode(prompt)
        assert bare["finish_reason"] == "length"
    assert none["usage"]["completion_tokens"] == 0 and one["usage"]["completion_tokens"] == 2


def test_streamed_logprobs_are_those_of_the_whole(served: Served):
    body = {"prompt": TEXT, "max_tokens": 9, "logprobs": 2, "echo": True, "return_token_ids": True}
    whole = complete(served, **body)["choices"][0]
    chunks = [chunk["choices"][0] for chunk in stream(served, COMPLETIONS, **body)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [item for chunk in chunks for item in (chunk["logprobs"] or {name: []})[name]]
        assert parts == whole["logprobs"][name], name
    assert [t for c in chunks for t in c.get("token_ids", [])] == whole["token_ids"]


def test_chat_logprobs(served: Served):
    body = {"messages": MESSAGES, "max_tokens": 5, "logprobs": True, "top_logprobs": 3}
    answer = served.post(CHAT, GREEDY | body).json()["choices"][0]
    content = answer["logprobs"]["content"]
    assert len(content) == 5
    assert "".join(bytes(c["bytes"]).decode() for c in content) == answer["message"]["content"]
    for entry in content:
        assert len(entry["top_logprobs"]) == 3 and math.isfinite(entry["logprob"])
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]
    chunks = [chunk["choices"][0] for chunk in stream(served, CHAT, **body)]
    streamed = [c for chunk in chunks for c in (chunk["logprobs"] or {"content": []})["content"]]
    assert streamed == content


def test_prompt_logprobs(served: Served):
    ids = served.decoder.encode(TEXT)
    expected = served.decoder.generate(ids, max_new_tokens=1, prompt_logprobs=1, **GREEDY)
    rows = complete(served, max_tokens=1, prompt_logprobs=1)["choices"][0]["prompt_logprobs"]
    assert rows[0] is None and len(rows) == len(ids)
    for token_id, row, each in zip(ids[1:], rows[1:], expected.prompt_logprobs, strict=True):
        assert row[str(token_id)]["logprob"] == pytest.approx(each.logprob)
        assert row[str(token_id)]["rank"] == each.rank
    body = GREEDY | {"messages": MESSAGES, "max_tokens": 1, "prompt_logprobs": 0}
    assert len(served.post(CHAT, body).json()["prompt_logprobs"]) > 5
    error = served.post(CHAT, body | {"stream": True}).json()["error"]
    assert error["param"] == "prompt_logprobs"  # which streams have no place for


def test_messages_that_go_on(served: Served):
    messages = [*MESSAGES, {"role": "assistant", "content": "It was very"}]
    body = GREEDY | {"messages": messages, "max_tokens": 4, "return_token_ids": True}
    body |= {"continue_final_message": True, "add_generation_prompt": False}
    answer = served.post(CHAT, body).json()
    expected = served.decoder.chat(
        messages, continue_final_message=True, max_new_tokens=4, **GREEDY
    )
    assert answer["choices"][0]["message"]["content"] == expected.text
    ids = served.decoder.render_chat(messages, continue_final_message=True)
    assert answer["prompt_token_ids"] == ids
    echoed = served.post(CHAT, body | {"echo": True}).json()["choices"][0]["message"]["content"]
    assert echoed == "It was very" + expected.text
    parts = [{"type": "text", "text": "It was"}, {"type": "text", "text": "very"}]
    body["messages"] = [*MESSAGES, {"role": "assistant", "content": parts}]
    echoed = served.post(CHAT, body | {"echo": True}).json()["choices"][0]["message"]["content"]
    assert echoed.startswith("It was\nvery")


@pytest.mark.parametrize("name", ["chat_template", "tools", "messages", "self", "mood"])
def test_what_is_no_template_variable(served: Served, name: str):
    body = GREEDY | {"messages": MESSAGES, "max_tokens": 1, "chat_template_kwargs": {name: "x"}}
    assert served.post(CHAT, body).json()["error"]["param"] == "chat_template_kwargs"


def test_a_variable_that_the_template_does_not_use(served: Served):
    body = GREEDY | {"messages": MESSAGES, "max_tokens": 1, "chat_template_kwargs": {"mood": 1}}
    response = served.post(CHAT, body)
    assert response.status_code == 400 and "mood" in response.json()["error"]["message"]
    body = {"messages": MESSAGES, "chat_template_kwargs": {"mood": 1}}
    assert served.post("/tokenize", body).json()["error"]["param"] == "chat_template_kwargs"
    body = {"messages": MESSAGES, "reasoning_effort": "low"}
    assert served.post(CHAT, body).json()["error"]["param"] == "reasoning_effort"
    body = {"input": TEXT, "reasoning": {"effort": "low"}}
    assert served.post("/v1/responses", body).json()["error"]["param"] == "reasoning.effort"


def test_what_a_template_does_not_take(tmp_path: Path):
    folder = write_scripted_model(tmp_path / "model")
    template = "{% for m in messages %}{{ raise_exception('Roles must alternate') }}{% endfor %}"
    write_byte_tokenizer(folder, template)
    with serving(folder) as served:
        error = served.post(CHAT, {"messages": MESSAGES}).json()["error"]
        assert error["param"] == "messages" and "Roles must alternate" in error["message"]
        write_byte_tokenizer(folder, None)
    with serving(folder) as served:
        for route, body in ((CHAT, {"messages": MESSAGES}), ("/v1/responses", {"input": TEXT})):
            error = served.post(route, body).json()["error"]
            assert error["param"] == ("input" if "input" in body else "messages")
            assert error["message"].endswith("this model has no chat template; use completions")


def test_text_parts(served: Served):
    parts = [{"type": "text", "text": "Hello"}]
    response = served.post(CHAT, {"messages": [{"role": "user", "content": parts}]})
    assert response.status_code in (200, 400)  # as the template can
    image = [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
    error = served.post(CHAT, {"messages": [{"role": "user", "content": image}]}).json()["error"]
    assert error["param"].startswith("messages[0].content")


def test_a_number_of_tokens_that_nobody_asked_for_shrinks_to_the_room(demo_model: Path):
    with serving(demo_model, engine={"max_seq_len": 64}, default_max_tokens=60) as served:
        prompt = [*range(500, 558)]
        assert complete(served, prompt=prompt)["usage"]["completion_tokens"] == 6
        chat = served.post(CHAT, GREEDY | {"messages": MESSAGES}).json()["usage"]
        assert chat["total_tokens"] == 64
        asked = {"prompt": prompt, "max_tokens": 7}
        error = served.post(COMPLETIONS, asked).json()["error"]
        assert error["message"].startswith("max_tokens: got 7, expected at most 6: input length")
        assert "exceed context limit: 58 + 7 > 64" in error["message"]
        for field in ("max_tokens", "max_completion_tokens"):
            error = served.post(CHAT, {"messages": MESSAGES, field: 60}).json()["error"]
            assert (error["param"], error["code"]) == (field, "context_length_exceeded")
        long = "Hello " * 64
        for route, field, body in (
            (COMPLETIONS, "prompt", {"prompt": long}),
            (CHAT, "messages", {"messages": [{"role": "user", "content": long}]}),
            ("/v1/responses", "input", {"input": long}),
        ):
            error = served.post(route, body).json()["error"]
            assert (error["param"], error["code"]) == (field, "context_length_exceeded")
            assert error["message"].startswith(f"{field}: prompt is too long: ")
            assert "this model's maximum context length is 64 tokens" in error["message"]


def test_cached_tokens(served: Served):
    prompt = list(range(500, 600))
    counts = [
        complete(served, prompt=prompt, max_tokens=1)["usage"]["prompt_tokens_details"]
        for _ in range(2)
    ]
    assert [each["cached_tokens"] for each in counts] == [0, 96]


def test_ours(served: Served):
    prompt = list(range(600, 700))
    dense = complete(served, prompt=prompt, max_tokens=20, attention="full", return_token_ids=True)
    sparse = complete(served, prompt=prompt, max_tokens=20)
    smaller = complete(served, prompt=prompt, max_tokens=20, token_budget=8)
    checked = complete(
        served, prompt=prompt, max_tokens=20, attention="verified", return_token_ids=True
    )
    read = [each["usage"]["tidaldecode"]["kv_bytes_read"] for each in (dense, sparse, smaller)]
    assert read[0] > read[1] > read[2] > 0
    names = [each["usage"]["tidaldecode"]["attention"] for each in (dense, sparse, checked)]
    assert names == ["full", "tidal", "verified"]
    assert checked["choices"][0]["token_ids"] == dense["choices"][0]["token_ids"]
    ours = checked["usage"]["tidaldecode"]
    assert ours["accepted_tokens"] <= ours["drafted_tokens"] and ours["dense_passes"] > 0
    assert ours["ngram_tokens"] == 0


def test_drafts_from_the_text_read_no_keys(demo_model: Path):
    prompt = [*range(600, 640)] * 3
    with serving(demo_model, engine={"attention": "full", "drafts": "ngram"}) as served:
        plain, checked = (
            complete(served, prompt=prompt, max_tokens=30, verify=verify)
            for verify in (False, True)
        )
    assert checked["choices"][0]["text"] == plain["choices"][0]["text"]
    ours = checked["usage"]["tidaldecode"]
    assert ours["attention"] == "verified"
    assert ours["ngram_tokens"] == ours["drafted_tokens"] > 0
    dense = plain["usage"]["tidaldecode"]["kv_bytes_read"] / 29
    assert ours["kv_bytes_read"] == pytest.approx(ours["dense_passes"] * dense)


@pytest.mark.parametrize("num_answers", [1, 3])
def test_usage_has_the_engines_times(served: Served, num_answers: int):
    answers = {"n": num_answers, "temperature": 1.0}
    for num_tokens in (1, 20):
        ours = complete(served, max_tokens=num_tokens, **answers)["usage"]["tidaldecode"]
        assert ours["time_to_first_token_s"] > 0
        assert (ours["decode_tokens_per_s"] > 0) is (num_tokens > 1)


def test_usage_in_every_chunk(served: Served):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream(served, CHAT, messages=MESSAGES, max_tokens=6, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["choices"]]
    assert counts[-1] == 6 and counts == sorted(counts)


def test_prompt_progress(served: Served):
    prompt = list(range(700, 1100))
    chunks = stream(served, COMPLETIONS, prompt=prompt, max_tokens=2, return_progress=True)
    told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    assert all(each["total"] == 400 and 0 < each["processed"] <= 400 for each in told)


def test_keep_alive(demo_model: Path):
    with serving(demo_model, sse_keep_alive_s=0.3, engine={"max_batch_size": 1}) as served:
        long = GREEDY | {"prompt": [5, 6, 7], "max_tokens": 500, "stream": True}
        hold = served.decoder.session()
        with httpx.stream("POST", served.url + COMPLETIONS, json=long) as first:
            next(first.iter_raw())
            text = served.post(COMPLETIONS, long | {"max_tokens": 2, "n": 1}).text
        hold.close()
        assert events_of(text.replace(": keep-alive\n\n", ""))[-1] == "[DONE]"


def test_stream_interval(demo_model: Path):
    with serving(demo_model, stream_interval=4) as served:
        chunks = stream(served, COMPLETIONS, prompt=TEXT, max_tokens=16)
        whole = complete(served, max_tokens=16)["choices"][0]["text"]
        pieces = [chunk["choices"][0]["text"] for chunk in chunks]
        assert "".join(pieces) == whole and len(pieces) <= 6


def test_tokenize_and_back(served: Served):
    found = served.post("/tokenize", {"prompt": TEXT, "return_token_strs": True}).json()
    ids = served.decoder.encode(TEXT)
    assert found["tokens"] == ids and found["count"] == len(ids) and found["max_model_len"] == 512
    assert "".join(found["token_strs"][1:]) == TEXT
    back = served.post("/detokenize", {"tokens": ids, "skip_special_tokens": True}).json()
    assert back == {"prompt": TEXT}
    chat = served.post("/tokenize", {"messages": MESSAGES}).json()
    assert chat["tokens"] == served.decoder.render_chat(MESSAGES)
    bare = served.post("/tokenize", {"prompt": TEXT, "add_special_tokens": False}).json()
    assert bare["tokens"] == ids[1:]
    info = httpx.get(served.url + "/tokenizer_info").json()
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    assert info.items() >= names.items() and "<|assistant|>" in info["chat_template"]
    for name, token_id in (("bos_token", 0), ("eos_token", 6)):
        asked = {"prompt": info[name], "add_special_tokens": False}
        assert served.post("/tokenize", asked).json()["tokens"] == [token_id]
    assert served.post("/tokenize", {}).json()["error"]["param"] == "prompt"
    assert served.post("/detokenize", {"tokens": [-1]}).status_code == 400


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path):
    with serving(write_checkpoint(tmp_path / "model", TinyModel())) as served:
        response = httpx.get(served.url + "/tokenizer_info")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "tokenizer_not_found"
        answer = served.post(COMPLETIONS, GREEDY | {"prompt": [5, 6, 7], "max_tokens": 2})
        assert answer.json()["usage"]["completion_tokens"] == 2


def test_metrics(demo_model: Path):
    with serving(demo_model, metrics_alias="vllm") as served:
        complete(served, max_tokens=7)
        assert httpx.head(served.url + "/metrics").status_code == 200
        text = httpx.get(served.url + "/metrics").text
        labels = '{engine="0",model_name="tidal-demo"}'
        for prefix in ("tidaldecode", "vllm"):
            assert f"{prefix}:generation_tokens_total{labels} 7.0" in text
            assert f"{prefix}:inter_token_latency_seconds_count{labels} 6.0" in text
            assert f"{prefix}:num_requests_running{labels} 0.0" in text
            # Also after a prompt that one pass has read.
            (seconds,) = re.findall(
                re.escape(f"{prefix}:request_prefill_time_seconds_sum{labels}") + " (.*)", text
            )
            assert float(seconds) > 0
        assert 'request_success_total{engine="0",finished_reason="length"' in text


def test_the_schema_names_every_field(served: Served):
    schema = httpx.get(served.url + "/openapi.json").json()
    body = schema["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = schema["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]["properties"]
    assert {"messages", "stream", "token_budget", "logprobs"} <= fields.keys()


@pytest.mark.parametrize(
    ("written", "ids"),
    [
        ("[5, 6]", [5, 6]),
        ("[5, 6.0]", [5, 6]),
        ("[[5], [6.0, 7]]", [[5], [6, 7]]),
        ('["5", "6"]', ["5", "6"]),
        ("[5, true]", None),
        ("[5, 6.5]", None),
        ("[5, -1]", None),
        ('[5, "6"]', None),
        ("[[5], 6]", None),
        ("[5, 2147483648]", None),
    ],
)
def test_ids_are_whole_numbers_however_they_are_written(written: str, ids: Any):
    data = b'{"prompt": %b}' % written.encode()
    if ids is not None:
        assert read_body(CompletionBody, data).prompt == ids
    else:
        with pytest.raises(ApiError, match="expected a text, a list of token ids"):
            read_body(CompletionBody, data)


def test_ids_of_a_long_prompt_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tidaldecode.server.bodies._whole", None)
    data = json.dumps({"prompt": list(range(100_000))}).encode()
    assert read_body(CompletionBody, data).prompt == list(range(100_000))
