"""The evaluation's prompts, own and generated, and how outputs are scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripted_model import write_byte_tokenizer
from tidaldecode import demo_model_dir
from tidaldecode.errors import InvalidArgument
from tidaldecode.evaluation.prompt_file import read_prompt_file
from tidaldecode.evaluation.scoring import RULES, score
from tidaldecode.evaluation.tasks import TASKS, make_examples
from tidaldecode.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(demo_model_dir(), 8192)


@pytest.mark.parametrize("context", [1024, 2048, 3001])
@pytest.mark.parametrize("name", TASKS)
def test_a_prompt_has_exactly_the_tokens_asked_for(tokenizer, name: str, context: int):
    for index in range(3):
        example = TASKS[name].example(tokenizer.encode, context, 0, index)
        assert len(example.prompt_ids) + example.max_new_tokens == context
        assert example.prompt_ids[0] == 0  # BOS
        assert list(example.prompt_ids) == tokenizer.encode(tokenizer.decode(example.prompt_ids))


@pytest.mark.parametrize("name", TASKS)
def test_the_answers_are_in_the_prompt_and_not_behind_it(tokenizer, name: str):
    example = TASKS[name].example(tokenizer.encode, 2048, 1, 0)
    text = " ".join(tokenizer.decode(example.prompt_ids).split())
    for answer in example.answers:
        assert answer in text
        assert answer not in text[-60:]
    assert score(example.rule, " ".join(example.answers), example.answers) == 1.0


def test_lengths_are_exact_with_one_token_per_byte(tmp_path: Path):
    encode = Tokenizer(write_byte_tokenizer(tmp_path), 320).encode
    for name in ("single", "common", "copy"):
        example = TASKS[name].example(encode, 2048, 0, 0)
        assert len(example.prompt_ids) + example.max_new_tokens == 2048


def test_a_seed_gives_the_same_examples_again(tokenizer: Tokenizer):
    def examples(seed: int) -> list:
        return list(make_examples(list(TASKS), tokenizer.encode, [1024], per_task=2, seed=seed))

    assert examples(3) == examples(3)
    assert {example.digest for example in examples(3)}.isdisjoint(
        example.digest for example in examples(4)
    )


def test_an_example_does_not_depend_on_its_neighbours(tokenizer: Tokenizer):
    alone = TASKS["copy"].example(tokenizer.encode, 1024, 0, 1)
    among = list(make_examples(["single", "copy"], tokenizer.encode, [1024], per_task=2, seed=0))
    assert alone in among


def test_the_single_needle_goes_through_all_depths(tokenizer: Tokenizer):
    examples = list(make_examples(["single"], tokenizer.encode, [1024], per_task=11, seed=0))
    depths = [example.depth for example in examples]
    assert depths[0] == depths[10] == 0.02 and depths[9] == 0.98
    assert depths[:10] == sorted(set(depths))
    for example in examples:
        text = tokenizer.decode(example.prompt_ids)
        place = text.index("The special magic number") / len(text)
        assert place == pytest.approx(example.depth, abs=0.08)


def test_a_context_too_short_is_refused(tokenizer: Tokenizer):
    with pytest.raises(InvalidArgument, match="keyvalue: context: got room for .* at least"):
        TASKS["keyvalue"].example(tokenizer.encode, 128, 0, 0)
    with pytest.raises(InvalidArgument, match="context: got room"):
        TASKS["single"].example(tokenizer.encode, 1, 0, 0)


def test_an_unknown_task_is_refused_with_the_known_ones(tokenizer: Tokenizer):
    with pytest.raises(InvalidArgument, match="task: got 'needle', expected one of single, "):
        list(make_examples(["needle"], tokenizer.encode, [1024], per_task=1, seed=0))


@pytest.mark.parametrize(
    ("rule", "output", "answers", "expected"),
    [
        ("first_number", " 12.", ["12"], 1.0),
        ("first_number", "7 or 12", ["12"], 0.0),
        ("first_number", "", ["12"], 0.0),
        ("share_found", "12, 34", ["12", "34", "56"], 2 / 3),
        ("share_found", "123", ["12"], 0.0),
        ("share_found", "Amber Harbor", ["amber\nharbor"], 1.0),
        ("any_found", "It is Paris.", ["Lyon", "paris"], 1.0),
        ("any_found", "C++, of course", ["C++"], 1.0),
        ("any_found", "comparison", ["paris"], 0.0),
        ("share_copied", " a b x d", ["a b c d"], 0.5),
        ("share_copied", "a b c d e", ["a b c d"], 1.0),
        ("share_copied", "", ["a b"], 0.0),
    ],
)
def test_scores(rule: str, output: str, answers: list[str], expected: float):
    assert score(rule, output, answers) == pytest.approx(expected)


def test_every_task_has_a_rule_that_exists():
    assert {task.rule for task in TASKS.values()} <= set(RULES)


def own_prompts(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_own_prompts_are_a_task(tokenizer: Tokenizer, tmp_path: Path):
    path = own_prompts(
        tmp_path / "capitals.jsonl",
        {"prompt": "France?", "answers": ["Paris"], "answers_note": "more fields are no harm"},
        "",
        {"prompt": "Italy?", "answers": "Rome"},
    )
    first, second = read_prompt_file(path, tokenizer.encode, max_new_tokens=5)
    assert (first.task, first.index, first.answers, first.context) == (
        "capitals", 0, ("Paris",), None,
    )  # fmt: skip
    assert (second.index, second.answers, second.max_new_tokens) == (1, ("Rome",), 5)
    assert list(second.prompt_ids) == tokenizer.encode("Italy?")
    assert len(read_prompt_file(path, tokenizer.encode, max_new_tokens=5, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nonsense", "line 2: not valid JSON"),
        ("[1]", "line 2: got a JSON list, expected an object"),
        ({"answers": ["x"]}, "line 2: prompt is missing; expected"),
        ({"prompt": "x"}, "line 2: answers is missing; expected"),
        ({"prompt": 3, "answers": ["x"]}, "line 2: prompt: got 3, expected a string"),
        ({"prompt": " ", "answers": ["x"]}, "line 2: prompt: got ' ', expected a string"),
        ({"prompt": "x", "answers": []}, r"line 2: answers: got \[\], expected a list"),
        ({"prompt": "x", "answers": ["", "y"]}, "line 2: answers: got"),
        ({"prompt": "x", "answers": [4]}, r"line 2: answers: got \[4\], expected"),
        ('{"prompt": "x", "prompt": "y", "answers": ["z"]}', "line 2: .* appears twice"),
    ],
)
def test_a_bad_line_is_named(tokenizer: Tokenizer, tmp_path: Path, line, expected: str):
    path = own_prompts(tmp_path / "own.jsonl", {"prompt": "x", "answers": ["y"]}, line)
    with pytest.raises(InvalidArgument, match=expected):
        read_prompt_file(path, tokenizer.encode, max_new_tokens=5)


def test_a_file_without_prompts_is_refused(tokenizer: Tokenizer, tmp_path: Path):
    with pytest.raises(InvalidArgument, match="got no prompts, expected lines such as"):
        read_prompt_file(own_prompts(tmp_path / "a", ""), tokenizer.encode, max_new_tokens=5)
    with pytest.raises(InvalidArgument, match="cannot be opened"):
        read_prompt_file(tmp_path / "none", tokenizer.encode, max_new_tokens=5)
