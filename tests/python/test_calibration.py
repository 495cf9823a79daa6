"""tidaldecode calibrate: the questions, which of them count, and what is kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from scripted_model import write_byte_tokenizer, write_scripted_model
from tidaldecode import demo_model_dir
from tidaldecode.calibration.data import (
    HELD_OUT_WORDS,
    WORDS,
    Question,
    QuestionSource,
    builtin_text,
)
from tidaldecode.calibration.questions import Examiner, answer_tokens
from tidaldecode.calibration.score_file import ScoreFile
from tidaldecode.cli.demo_text import KEY_WORDS
from tidaldecode.errors import InvalidArgument
from tidaldecode.evaluation.tasks import make_examples
from tidaldecode.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(demo_model_dir(), 8192)


def source_of(tokenizer: Tokenizer, **changes) -> QuestionSource:
    values = {"text": builtin_text(), "encode": tokenizer.encode, "contexts": (512,), "seed": 0}
    return QuestionSource(**(values | changes))


def test_prompts_are_as_long_as_asked_and_the_same_for_a_seed(tokenizer: Tokenizer):
    source = source_of(tokenizer)
    questions = [source.question(512, index) for index in range(5)]
    assert {len(q.prompt_ids) + q.room for q in questions} == {512}
    assert questions == [source_of(tokenizer).question(512, index) for index in range(5)]
    assert source.digest() == source_of(tokenizer).digest()
    other = source_of(tokenizer, seed=1)
    assert {other.question(512, i).prompt_ids for i in range(5)}.isdisjoint(
        q.prompt_ids for q in questions
    )
    assert other.digest() != source.digest()


def test_questions_held_out_have_words_of_their_own(tokenizer: Tokenizer):
    assert set(HELD_OUT_WORDS).isdisjoint(WORDS)
    own = source_of(tokenizer)
    held_out = source_of(tokenizer, words=HELD_OUT_WORDS)
    for index in range(4):
        used, unused = (
            tokenizer.decode(s.question(512, index).prompt_ids) for s in (own, held_out)
        )
        assert used != unused


def test_the_evaluation_shares_nothing_with_it(tokenizer: Tokenizer):
    """No key word, and no line of eight words, is in prompts of both."""
    assert {*WORDS, *HELD_OUT_WORDS}.isdisjoint(KEY_WORDS)

    def phrases(prompts: list) -> set[tuple[str, ...]]:
        texts = [tokenizer.decode(ids).split() for ids in prompts]
        return {tuple(words[i : i + 8]) for words in texts for i in range(len(words) - 7)}

    source = source_of(tokenizer)
    own = [source.question(1024, index).prompt_ids for index in range(10)]
    names = ["single", "multikey", "multivalue", "multiquery", "variables", "keyvalue", "copy"]
    examples = make_examples(names, tokenizer.encode, [1024], per_task=3, seed=0)
    assert phrases(own).isdisjoint(phrases([example.prompt_ids for example in examples]))


def test_the_answer_is_in_the_prompt(tokenizer: Tokenizer):
    source = source_of(tokenizer)
    for index in range(10):
        question = source.question(512, index)
        text = " ".join(tokenizer.decode(question.prompt_ids).split())
        assert question.answer in text, index
        assert not text.endswith(question.answer)


def test_a_text_without_sentences_is_refused(tokenizer: Tokenizer):
    with pytest.raises(InvalidArgument, match="no two sentences"):
        source_of(tokenizer, text="word " * 2000).question(512, 0)


# Questions that count


@pytest.mark.parametrize(
    ("output", "answer", "count", "num_answer"),
    [
        ("4 8 3 9 2 0 .", "4 8 3 9 2 0", 6, 6),
        ("It is 7 , sure", "7", 3, 1),
        ("It is 7 8 and 7 8", "7 8", 4, 2),
        ("483920", "48392", 0, 0),  # the number goes on
        ("nothing", "7", 0, 0),
        ("", "7", 0, 0),
    ],
)
def test_an_answer_is_whole_however_many_tokens_it_takes(
    output: str, answer: str, count: int, num_answer: int
):
    tokens = output.split()
    ids = list(range(len(tokens)))
    got = answer_tokens(lambda some: " ".join(tokens[i] for i in some), ids, answer)
    assert got == (ids[:count], num_answer)


def test_digits_that_are_tokens_each_are_compared_to_the_last(tmp_path: Path):
    """A tokenizer of bytes: six digits are six tokens, and all of them count."""
    tokenizer = Tokenizer(write_byte_tokenizer(write_scripted_model(tmp_path)), 320)
    source = source_of(tokenizer, contexts=(4096,))
    question = source.question(4096, 0)
    assert len(tokenizer.encode(question.answer)) - len(tokenizer.encode("")) == 6
    output = tokenizer.encode(f" {question.answer}. And so on.", add_special_tokens=False)
    token_ids, num_answer = answer_tokens(tokenizer.decode, output, question.answer)
    assert tokenizer.decode(token_ids) == f" {question.answer}" and num_answer == 6
    assert question.room >= 24 + 6


class ScriptedExaminer(Examiner):
    """Answers some of the questions, and counts how often it is asked."""

    def __init__(self, scores: ScoreFile, known: Callable[[Question], bool]) -> None:
        super().__init__(None, scores, Silent())
        self.known, self.batches = known, []

    def _answers(self, questions, title, is_sure):
        self.batches.append(questions[0].context)
        known = self.known if is_sure else lambda question: True
        return [([1, 2], 1) if known(question) else ([], 0) for question in questions]


class Silent:
    """A reporter that shows nothing."""

    @contextmanager
    def reading(self, title: str):
        yield lambda done, total: None

    counting = loading = reading


class FewQuestions:
    """A source that costs nothing."""

    num_forms = 5

    def __init__(self, contexts: tuple[int, ...]) -> None:
        self.contexts = contexts

    def question(self, context: int, index: int) -> Question:
        return Question(context=context, index=index, prompt_ids=(index,), answer="", room=4)


def test_questions_are_drawn_until_enough_count():
    examiner = ScriptedExaminer(ScoreFile(None), lambda question: question.index % 10 < 5)
    exam = examiner.ask(FewQuestions((100, 400)), "questions")
    assert exam.is_enough and len(exam.answered) >= 24 and 40 <= exam.num_asked <= 56
    assert examiner.batches[:6] == [100, 400] * 3  # the contexts in turn
    assert {answered.token_ids for answered in exam.answered} == {(1, 2)}
    places = [(answered.context, answered.prompt_ids) for answered in exam.answered]
    assert len(set(places)) == len(places)


def test_forms_and_contexts_that_are_not_answered_are_given_up():
    """A model that can do one of five ways of asking can still judge by it."""
    examiner = ScriptedExaminer(ScoreFile(None), lambda question: question.index % 5 == 3)
    exam = examiner.ask(FewQuestions((100, 400)), "questions")
    assert exam.is_enough and exam.num_asked <= 24 + 2 * 4 * 4 + 4
    short = ScriptedExaminer(ScoreFile(None), lambda question: question.context == 100)
    exam = short.ask(FewQuestions((100, 400)), "questions")
    assert exam.is_enough and {answered.context for answered in exam.answered} == {100}
    nobody = ScriptedExaminer(ScoreFile(None), lambda question: False)
    exam = nobody.ask(FewQuestions((100,)), "questions")
    assert not exam.is_enough and exam.num_asked == 20


def test_of_those_held_out_all_right_answers_count():
    examiner = ScriptedExaminer(ScoreFile(None), lambda question: False)
    assert examiner.ask(FewQuestions((100,)), "questions held out", is_sure=False).is_enough


def test_there_is_an_end_to_asking():
    examiner = ScriptedExaminer(ScoreFile(None), lambda question: question.index // 5 % 5 == 0)
    exam = examiner.ask(FewQuestions((100,)), "questions")
    assert exam.num_asked == 96 and not exam.is_enough


def test_what_was_answered_is_not_asked_again(tmp_path: Path):
    first = ScriptedExaminer(ScoreFile(tmp_path / "scores"), lambda question: True)
    again = ScriptedExaminer(ScoreFile(tmp_path / "scores"), lambda question: False)
    source = FewQuestions((100,))
    first.ask(source, "questions")
    again = ScriptedExaminer(ScoreFile(tmp_path / "scores"), lambda question: False)
    assert again.ask(source, "questions").is_enough and again.batches == []
    assert not again.ask(source, "questions held out").is_enough  # others


# Scores on disk


@pytest.mark.parametrize(
    "damage",
    [b"", b"torn", b'["a", NaN]\n', b"\xff\xfe\n", b"[" * 100_000, b'["a"]\n[1, 2]\nnull\n'],
    ids=lambda damage: str(damage[:12]),
)
def test_a_damaged_score_file_costs_only_its_lines(tmp_path: Path, damage: bytes):
    path = tmp_path / "deep" / "scores.jsonl"
    ScoreFile(path).put("kept", [1.5, 2])
    path.write_bytes(path.read_bytes() + damage)
    scores = ScoreFile(path)
    assert scores.get("kept") == [1.5, 2] and scores.get("a") is None
    scores.put("more", 3)
    assert ScoreFile(path).get("more") == 3 and ScoreFile(path).get("kept") == [1.5, 2]


def test_scores_that_cannot_be_written_are_kept_in_memory(tmp_path: Path, caplog):
    (tmp_path / "file").write_text("")
    scores = ScoreFile(tmp_path / "file" / "scores.jsonl")
    scores.put("a", 1)
    scores.put("b", 2)
    assert (scores.get("a"), scores.get("b")) == (1, 2)
    assert caplog.text.count("the scores are not kept") == 1
