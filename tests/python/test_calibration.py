"""tidaldecode calibrate: the questions, which of them count, and what is kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from scripted_model import write_byte_tokenizer, write_scripted_model
from tidaldecode import demo_model_dir
from tidaldecode.calibration.data import (
    HELD_OUT_WORDS,
    MOST_QUESTIONS,
    WORDS,
    Document,
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


def prompts_of(source: QuestionSource, context: int, index: int) -> list[tuple[int, ...]]:
    return [question.prompt_ids for question in source.document(context, index).questions]


def test_documents_are_as_long_as_asked_and_the_same_for_a_seed(tokenizer: Tokenizer):
    source = source_of(tokenizer)
    documents = [source.document(512, index) for index in range(6)]
    for document in documents:
        assert max(len(q.prompt_ids) for q in document.questions) + document.room == 512
        assert 1 <= len(document.questions) <= MOST_QUESTIONS
    assert documents == [source_of(tokenizer).document(512, index) for index in range(6)]
    assert source.digest() == source_of(tokenizer).digest()
    other = source_of(tokenizer, seed=1)
    assert set(prompts_of(source, 512, 0)).isdisjoint(prompts_of(other, 512, 0))
    assert other.digest() != source.digest()


def test_questions_of_a_document_begin_alike(tokenizer: Tokenizer):
    """With all of the document, so that it is read once; and none is asked twice."""
    document = source_of(tokenizer).document(4096, 0)
    assert len(document.questions) == MOST_QUESTIONS
    first, *others = [question.prompt_ids for question in document.questions]
    for other in others:
        common = next(i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b)
        assert common > 4096 - document.room - 100
    assert len({question.prompt_ids for question in document.questions}) == MOST_QUESTIONS


def test_a_short_document_has_fewer_questions_and_all_forms_have_their_turn(tokenizer: Tokenizer):
    source = source_of(tokenizer)
    counts = [len(source.document(300, index).questions) for index in range(source.num_forms)]
    assert min(counts) >= 1 and sum(counts) < source.num_forms * MOST_QUESTIONS / 2
    asked = {
        tokenizer.decode(prompts_of(source, 300, index)[0][-12:])
        for index in range(source.num_forms)
    }
    assert len(asked) == source.num_forms


def test_questions_held_out_have_words_of_their_own(tokenizer: Tokenizer):
    assert set(HELD_OUT_WORDS).isdisjoint(WORDS)
    own = source_of(tokenizer)
    held_out = source_of(tokenizer, words=HELD_OUT_WORDS)
    for index in range(4):
        assert prompts_of(own, 512, index) != prompts_of(held_out, 512, index)


def test_the_evaluation_shares_nothing_with_it(tokenizer: Tokenizer):
    """No key word, and no line of eight words, is in prompts of both."""
    assert {*WORDS, *HELD_OUT_WORDS}.isdisjoint(KEY_WORDS)

    def phrases(prompts: list) -> set[tuple[str, ...]]:
        texts = [tokenizer.decode(ids).split() for ids in prompts]
        return {tuple(words[i : i + 8]) for words in texts for i in range(len(words) - 7)}

    source = source_of(tokenizer)
    own = [prompt for index in range(2) for prompt in prompts_of(source, 1024, index)]
    names = ["single", "multikey", "multivalue", "multiquery", "variables", "keyvalue", "copy"]
    examples = make_examples(names, tokenizer.encode, [1024], per_task=3, seed=0)
    assert phrases(own).isdisjoint(phrases([example.prompt_ids for example in examples]))


def test_the_answers_are_in_the_prompt(tokenizer: Tokenizer):
    source = source_of(tokenizer)
    for index in range(6):
        for question in source.document(2048, index).questions:
            text = " ".join(tokenizer.decode(question.prompt_ids).split())
            for answer in question.answers:
                assert answer in text, (index, answer)
                assert not text.endswith(answer)


def test_a_text_without_sentences_is_refused(tokenizer: Tokenizer):
    with pytest.raises(InvalidArgument, match="no two sentences"):
        source_of(tokenizer, text="word " * 2000).document(512, 0)


# Questions that count


@pytest.mark.parametrize(
    ("output", "answers", "count", "num_answer"),
    [
        ("4 8 3 9 2 0 .", ["4 8 3 9 2 0"], 6, 6),
        ("It is 7 , sure", ["7"], 3, 1),
        ("It is 7 8 and 7 8", ["7 8"], 4, 2),
        ("483920", ["48392"], 0, 0),  # the number goes on
        ("nothing", ["7"], 0, 0),
        ("", ["7"], 0, 0),
        ("They are 5 , 4 and 6 .", ["4", "5", "6"], 7, 5),  # in whatever order
        ("They are 5 and 6 .", ["4", "5", "6"], 0, 0),
    ],
)
def test_an_answer_is_whole_however_many_tokens_it_takes(
    output: str, answers: list[str], count: int, num_answer: int
):
    tokens = output.split()
    ids = list(range(len(tokens)))
    got = answer_tokens(lambda some: " ".join(tokens[i] for i in some), ids, answers)
    assert got == (ids[:count], num_answer)


def test_digits_that_are_tokens_each_are_compared_to_the_last(tmp_path: Path):
    """A tokenizer of bytes: six digits are six tokens, and all of them count."""
    tokenizer = Tokenizer(write_byte_tokenizer(write_scripted_model(tmp_path)), 320)
    document = source_of(tokenizer, contexts=(4096,)).document(4096, 0)
    (answer,) = document.questions[0].answers
    assert len(tokenizer.encode(answer)) - len(tokenizer.encode("")) == 6
    output = tokenizer.encode(f" {answer}. And so on.", add_special_tokens=False)
    token_ids, num_answer = answer_tokens(tokenizer.decode, output, [answer])
    assert tokenizer.decode(token_ids) == f" {answer}" and num_answer == 6
    assert document.room >= 24 + 3 * 6


class ScriptedExaminer(Examiner):
    """Answers some of the questions, and counts how often it is asked."""

    def __init__(self, scores: ScoreFile, known: Callable[[int, int], bool]) -> None:
        """
        Args:
            scores: where answers are kept.
            known: whether the answer to a document's question of a number counts.
        """
        super().__init__(None, scores)
        self.known, self.asked = known, []

    def _answers(self, name, document, is_sure):
        self.asked.append(document.context)
        known = self.known if is_sure else lambda *place: True
        return [
            ([1, 2], 1) if known(document.context, number) else ([], 0)
            for number in range(len(document.questions))
        ]


class FewQuestions:
    """A source that costs nothing."""

    def __init__(self, contexts: tuple[int, ...], count: int = 8) -> None:
        self.contexts, self.count = contexts, count

    def document(self, context: int, index: int) -> Document:
        questions = [
            Question(prompt_ids=(context, index, number), answers=("",))
            for number in range(self.count)
        ]
        return Document(context=context, room=4, questions=tuple(questions))


def test_documents_are_read_until_enough_questions_count():
    examiner = ScriptedExaminer(ScoreFile(None), lambda context, number: number < 5)
    exam = examiner.ask(FewQuestions((100, 400)), "questions")
    assert exam.is_enough and exam.num_counted == 25 and exam.num_asked == 40
    assert examiner.asked == [100, 400, 100, 400, 100]  # the contexts in turn
    names = [answered.name for answered in exam.answered]
    assert names == [
        "questions 100 0", "questions 400 0", "questions 100 1", "questions 400 1",
        "questions 100 2",
    ]  # fmt: skip
    assert exam.answered[0].outputs[4:6] == (([1, 2], 1), ([], 0))


def test_contexts_that_are_not_answered_are_given_up():
    """A model that can answer one of eight questions can still judge by it."""
    examiner = ScriptedExaminer(ScoreFile(None), lambda context, number: number == 3)
    exam = examiner.ask(FewQuestions((100, 400)), "questions")
    assert exam.is_enough and exam.num_asked == 24 * 8
    short = ScriptedExaminer(ScoreFile(None), lambda context, number: context == 100)
    exam = short.ask(FewQuestions((100, 400)), "questions")
    assert exam.is_enough and {own.document.context for own in exam.answered} == {100}
    assert short.asked.count(400) == 2
    nobody = ScriptedExaminer(ScoreFile(None), lambda context, number: False)
    exam = nobody.ask(FewQuestions((100,)), "questions")
    assert not exam.is_enough and exam.num_asked == 16 and exam.answered == ()


def test_of_those_held_out_all_right_answers_count():
    examiner = ScriptedExaminer(ScoreFile(None), lambda *place: False)
    assert examiner.ask(FewQuestions((100,)), "questions held out", is_sure=False).is_enough


def test_there_is_an_end_to_asking():
    examiner = ScriptedExaminer(ScoreFile(None), lambda context, number: len(examiner.asked) == 1)
    exam = examiner.ask(FewQuestions((100,)), "questions")
    assert exam.num_asked == 192 and not exam.is_enough and len(exam.answered) == 1


def test_what_was_answered_is_not_asked_again(tmp_path: Path):
    first = ScriptedExaminer(ScoreFile(tmp_path / "scores"), lambda *place: True)
    source = FewQuestions((100,))
    first.ask(source, "questions")
    again = ScriptedExaminer(ScoreFile(tmp_path / "scores"), lambda *place: False)
    assert again.ask(source, "questions").is_enough and again.asked == []
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
