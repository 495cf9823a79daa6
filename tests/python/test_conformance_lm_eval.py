"""lm_eval against the server: the scores are those of the same decoder in this process."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")

from serving import Served, serving  # noqa: E402
from tidaldecode import Decoder  # noqa: E402

NEEDED = ("lm_eval", "tenacity", "aiohttp", "requests", "tqdm", "transformers")

pytestmark = [
    pytest.mark.conformance,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in NEEDED), reason="needs lm_eval[api]"
    ),
]

MAX_LENGTH = 256
BOS, EOS = 0, 6  # of tidal-demo
TOLERANCE = 1e-5  # of sums of log-probabilities that have been numbers in JSON
TEXTS = (
    "The sky over the harbour was grey, and the boats had not gone out.",
    "def add(a, b):\n    return a + b\n",
    "Ünïcödé: 日本語, 🎉 and a long tail of words. " * 12,  # longer than MAX_LENGTH
    "x",
)
CHOICES = (
    ("The sky over the harbour was", ["grey", "a number", "blue and clear", "\n\n0x00"], 2),
    ("Question: 2 + 2?\nAnswer:", ["4", "5", "four", "\u4e16"], 0),
    ("A B A B A", ["B", "A", "C C", "b"], 0),
    ("The name of the cat is", ["Tom", "the", "cat cat", "unknown"], 3),
)
TASKS: dict[str, dict[str, Any]] = {
    "tidal_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}", "should_decontaminate": False,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tidal_perplexity": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"},
                        {"metric": "bits_per_byte"}],
    },
    "tidal_ending": {
        "output_type": "loglikelihood", "doc_to_text": "{{text}}",
        "doc_to_target": " {{choices[label]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "tidal_text": {
        "output_type": "generate_until", "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["the", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip
SCORED = ("tidal_choice", "tidal_perplexity", "tidal_ending")


@pytest.fixture(scope="module")
def served(demo_model: Path) -> Iterator[Served]:
    with serving(demo_model, engine={"sparse_min_context": 0, "token_budget": 24}) as served:
        yield served


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files with their data."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": text} for text in TEXTS]
    cases = [dict(zip(("text", "choices", "label"), case, strict=True)) for case in CHOICES]
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        lines = rows if name == "tidal_perplexity" else cases
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        fields = {"task": name, "dataset_path": "json", "test_split": "test"}
        fields["dataset_kwargs"] = {"data_files": {"test": str(data)}}
        (folder / f"{name}.yaml").write_text(json.dumps(fields | task))  # JSON is YAML
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def in_process(decoder: Decoder) -> Any:
    """lm_eval's model of a decoder: what clients get over HTTP, without HTTP."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class InProcess(TemplateLM):
        eot_token_id = EOS
        prefix_token_id = BOS
        tokenizer_name = "tidal-demo"
        is_chat = False

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            return decoder.encode(string, add_special_tokens=False)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return [self._score(context, ending) for _, context, ending in requests]

        def _score(self, context: list[int], ending: list[int]) -> tuple[float, bool]:
            ids = (context + ending)[-MAX_LENGTH:]
            result = decoder.submit(ids, max_new_tokens=1, prompt_logprobs=1).result()
            assert result.prompt_logprobs is not None
            scored = result.prompt_logprobs[-len(ending) :]
            assert [each.token_id for each in scored] == ending[-len(scored) :]
            is_greedy = all(each.logprob == each.top[0][1] for each in scored)
            return sum(each.logprob for each in scored), is_greedy

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> list[float]:
            sums = []
            for (text,) in (request.args for request in requests):
                windows = get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, MAX_LENGTH - 1, 1
                )
                scores = [self._score(*make_disjoint_window(window)) for window in windows]
                sums.append(sum(score for score, _ in scores))
            return sums

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            texts = []
            for prompt, options in (request.args for request in requests):
                stops, most = options["until"], options["max_gen_toks"]
                settings = {"max_new_tokens": most, "stop": stops, "temperature": 0}
                if self.is_chat:
                    texts.append(decoder.chat(json.loads(prompt), **settings).text)
                else:
                    texts.append(decoder.generate(self.tok_encode(prompt), **settings).text)
            return texts

        def apply_chat_template(self, messages: Any, add_generation_prompt: bool = True) -> str:
            return json.dumps(messages)

    return InProcess()


def evaluate(model: Any, tasks: Path, names: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """The scores of each task, and what the model answered in each of its requests."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False, include_path=str(tasks))
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(names), task_manager=manager, bootstrap_iters=0, **more
    )
    assert found is not None
    answers = {
        name: [sample["resps"] for sample in sorted(samples, key=lambda each: each["doc_id"])]
        for name, samples in found["samples"].items()
    }
    return {"scores": {name: numbers(found["results"][name]) for name in names}, "answers": answers}


def numbers(fields: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in fields.items() if isinstance(value, float)}


def flat(value: Any) -> list[Any]:
    """The leaves of nested lists."""
    if isinstance(value, (list, tuple)):
        return [leaf for each in value for leaf in flat(each)]
    return [value]


def check_same(over_http: dict[str, Any], here: dict[str, Any]) -> None:
    for name, scores in here["scores"].items():
        assert scores and over_http["scores"][name] == pytest.approx(scores, rel=TOLERANCE)
        pairs = zip(flat(over_http["answers"][name]), flat(here["answers"][name]), strict=True)
        for found, expected in pairs:
            if isinstance(expected, float):
                expected = pytest.approx(expected, rel=TOLERANCE)
            assert found == expected, name


def remote(served: Served, kind: str, **more: Any) -> Any:
    """lm_eval's own client."""
    from lm_eval.api.registry import get_model

    route = "/v1/chat/completions" if "chat" in kind else "/v1/completions"
    options = {"model": "tidal-demo", "max_length": MAX_LENGTH + 1, "max_retries": 1}
    # With the server's tokenizer lm_eval takes a BOS whose id is 0 for none.
    options["custom_prefix_token_id"] = BOS
    return get_model(kind)(base_url=served.url + route, **options | more)


CLIENTS: dict[str, dict[str, Any]] = {
    "one at a time, its own tokenizer": {"tokenizer_backend": "huggingface"},
    "the server's tokenizer": {},  # lm_eval finds it by itself
    "batches": {"batch_size": 3},
    "at once": {"num_concurrent": 4, "batch_size": 2},
}


@pytest.mark.parametrize("client", CLIENTS)
def test_completions_score_as_in_process(
    served: Served, tasks: Path, demo_model: Path, client: str
):
    options = dict(CLIENTS[client])
    if options.get("tokenizer_backend") == "huggingface":
        options["tokenizer"] = str(demo_model)
    names = (*SCORED, "tidal_text")
    model = remote(served, "local-completions", **options)
    if client != "one at a time, its own tokenizer":
        assert model.tokenizer_backend == "remote"
    here = evaluate(in_process(served.decoder), tasks, names)
    check_same(evaluate(model, tasks, names), here)
    assert len({text for text in flat(here["answers"]["tidal_text"])}) > 1


def test_chats_answer_as_in_process(served: Served, tasks: Path):
    here = in_process(served.decoder)
    here.is_chat = True
    chat = {"apply_chat_template": True, "system_instruction": "Be brief."}
    model = remote(served, "local-chat-completions", eos_string="<|end|>")
    names = ("tidal_text",)
    check_same(evaluate(model, tasks, names, **chat), evaluate(here, tasks, names, **chat))
