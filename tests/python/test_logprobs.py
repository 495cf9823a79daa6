"""Log-probabilities of new and given tokens: those of transformers, whoever else is decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tidaldecode import Decoder, InvalidArgument
from tiny_models import TinyModel, random_prompt, write_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = TinyModel(num_layers=3, seed=5)
GREEDY = {"temperature": 0, "ignore_eos": True}
OPTIONS = {"device": "cpu", "num_threads": 1, "max_seq_len": 256, "page_size": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("logprobs"), TINY)


@pytest.fixture(scope="module")
def reference(folder: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def log_softmax(token_ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            logits = model(torch.tensor([token_ids])).logits[0]
        return torch.log_softmax(logits.double(), dim=-1).numpy()

    return log_softmax


def check(each, expected: np.ndarray, token_id: int, num_top: int) -> None:
    """One token's, against the log-softmax of the logits before it."""
    assert each.token_id == token_id
    assert each.logprob == pytest.approx(expected[token_id], abs=1e-4)
    assert abs(int((expected > expected[token_id]).sum()) + 1 - each.rank) <= 1
    assert len(each.top) == num_top
    best = np.sort(expected)[::-1][:num_top]
    assert [value for _, value in each.top] == pytest.approx(best.tolist(), abs=1e-4)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_they_are_those_of_transformers(folder: Path, reference, verify, temperature):
    prompts = [random_prompt(TINY, length, seed=length) for length in (1, 2, 40, 90)]
    plan = {"attention": "full"}
    if verify:  # the tokens are dense
        plan = {"scored_layers": [2], "token_budget": 8, "sparse_min_context": 0, "verify": True}
    with Decoder(folder, **OPTIONS, **plan, max_batch_size=3, prefill_chunk=32) as decoder:
        results = decoder.generate(
            prompts, max_new_tokens=12, temperature=temperature, seed=3, ignore_eos=True,
            repetition_penalty=1.2, logprobs=5, prompt_logprobs=2,
        )  # fmt: skip
    for prompt, result in zip(prompts, results, strict=True):
        text = prompt + list(result.token_ids)
        expected = reference(text)
        assert len(result.prompt_logprobs or ()) == len(prompt) - 1
        for i, each in enumerate(result.prompt_logprobs or ()):
            check(each, expected[i], prompt[i + 1], 2)
        for i, each in enumerate(result.logprobs):
            check(each, expected[len(prompt) - 1 + i], result.token_ids[i], 5)


def same(one, other) -> bool:
    """Whether they are the same to rounding: prompts that share a pass are rows of one product."""
    if one is None or other is None:
        return one is other
    pairs = list(zip(one, other, strict=True))
    return all(
        (a.token_id, [i for i, _ in a.top]) == (b.token_id, [i for i, _ in b.top])
        and np.allclose([a.logprob, *(v for _, v in a.top)], [b.logprob, *(v for _, v in b.top)],
                        rtol=0, atol=2e-5)
        for a, b in pairs
    )  # fmt: skip


def test_neighbours_change_nothing(folder: Path):
    prompts = [random_prompt(TINY, length, seed=length) for length in (33, 20, 64, 5, 50)]
    asked = [{"logprobs": 3}, {}, {"prompt_logprobs": 4}, {"logprobs": 0}, {"prompt_logprobs": 0}]
    with Decoder(folder, **OPTIONS, attention="full", max_batch_size=5) as decoder:
        alone = [
            decoder.generate(prompt, max_new_tokens=10, **GREEDY, **options)
            for prompt, options in zip(prompts, asked, strict=True)
        ]
    with Decoder(folder, **OPTIONS, attention="full", max_batch_size=5) as decoder:
        requests = [
            decoder.submit(prompt, max_new_tokens=10, **GREEDY, **options)
            for prompt, options in zip(prompts, asked, strict=True)
        ]
        for request, right in zip(requests, alone, strict=True):
            result = request.result()
            assert result.token_ids == right.token_ids
            assert same(result.logprobs, right.logprobs)
            assert same(result.prompt_logprobs, right.prompt_logprobs)
    assert alone[1].logprobs is None and alone[1].prompt_logprobs is None


def test_paused_requests_are_scored_once(folder: Path):
    """Pages run out: who is paused reads again, and is given nothing twice."""
    prompts = [random_prompt(TINY, 60, seed=seed) for seed in range(3)]
    options = {"max_new_tokens": 60, "logprobs": 1, "prompt_logprobs": 1, **GREEDY}
    with Decoder(folder, **OPTIONS, attention="full", max_batch_size=3) as decoder:
        alone = [decoder.generate(prompt, **options) for prompt in prompts]
    with Decoder(folder, **OPTIONS, attention="full", max_batch_size=3, num_pages=17) as decoder:
        together = decoder.generate(prompts, **options)
    for result, right in zip(together, alone, strict=True):
        assert result.token_ids == right.token_ids
        assert len(result.prompt_logprobs) == 59
        assert same(result.prompt_logprobs, right.prompt_logprobs)
        assert same(result.logprobs, right.logprobs)


def test_a_known_prompt_is_scored_all_the_same(folder: Path):
    prompt = random_prompt(TINY, 60, seed=1)
    with Decoder(folder, **OPTIONS, attention="full") as decoder:
        decoder.generate(prompt, max_new_tokens=2)
        result = decoder.generate(prompt, max_new_tokens=2, prompt_logprobs=0)
        assert result.cached_tokens == 0 and len(result.prompt_logprobs) == 59
        assert decoder.generate(prompt, max_new_tokens=2, logprobs=0).cached_tokens == 48


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", [-1, 21, 1.5, "3", True])
def test_bad_numbers_are_refused(folder: Path, name: str, value):
    with Decoder(folder, **OPTIONS, attention="full") as decoder:
        for call in (decoder.generate, decoder.submit):
            with pytest.raises(InvalidArgument, match=f"{name}: got"):
                call([1, 2, 3], **{name: value})
