"""tidaldecode calibrate: its search and its yardstick."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tidaldecode import Decoder, demo_model_dir
from tidaldecode.calibration import objective as objective_module
from tidaldecode.calibration.data import (
    QuestionSource,
    builtin_text,
)
from tidaldecode.calibration.objective import (
    Group,
    GroupScore,
    Objective,
    Scores,
    question_groups,
    text_groups,
)
from tidaldecode.calibration.questions import Answered
from tidaldecode.calibration.score_file import ScoreFile
from tidaldecode.calibration.search import (
    Candidate,
    Point,
    Search,
    canonical,
    choose,
    frontier,
)
from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.errors import TidalError, UnsupportedError
from tidaldecode.evaluation.distributions import divergences
from tidaldecode.evaluation.perplexity import make_windows
from tidaldecode.plan_bytes import kv_bytes_per_step
from tidaldecode.replay import Replay
from tidaldecode.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(demo_model_dir(), 8192)


def source_of(tokenizer: Tokenizer, **changes) -> QuestionSource:
    values = {"text": builtin_text(), "encode": tokenizer.encode, "contexts": (512,), "seed": 0}
    return QuestionSource(**(values | changes))


class Silent:
    """A reporter that shows nothing."""

    @contextmanager
    def reading(self, title: str):
        yield lambda done, total: None

    counting = loading = reading


# Search

MODEL = ModelConfig(
    vocab_size=100, hidden_size=64, intermediate_size=64, num_layers=12, num_q_heads=4,
    num_kv_heads=2, head_dim=16, max_position_embeddings=4096,
)  # fmt: skip


def scores(loss: float) -> Scores:
    return Scores(text_loss=loss, text_kl=loss, answer_kl=0.0, agreement=1.0)


def planted(candidate: Candidate) -> Scores:
    """Least at layers 2, 5 and 9, recents of a quarter, one sink, one set for all heads."""
    loss = 0.1 * sum(best not in candidate.choosing_layers for best in (2, 5, 9))
    loss += 10.0 / candidate.token_budget + 0.001 * len(candidate.select_layers)
    loss += 0.1 * abs(candidate.recent_share - 0.25) + 0.01 * candidate.sink_tokens
    return scores(loss + 0.1 * (candidate.granularity != "layer"))


class Measuring:
    """Losses as planted, quick ones a little off; counts what is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Candidate, bool]] = []
        self.stages: list[str] = []

    def __call__(self, candidates, is_quick: bool, stage) -> list[Scores]:
        self.asked += [(candidate, is_quick) for candidate in candidates]
        self.stages.append(str(stage))
        noise = 0.05 if is_quick else 0.0
        return [
            scores(planted(c).loss + noise * (sum(c.choosing_layers) % 7) / 7) for c in candidates
        ]


def test_the_search_finds_what_is_planted():
    measure = Measuring()
    points = Search(MODEL, measure, seq_len=1000, value_bytes=4).run([16, 64, 256])
    best = choose(points, planted(Candidate(scored_layers=(2, 5, 9), token_budget=256)).loss)
    assert best.candidate == Candidate(scored_layers=(2, 5, 9), token_budget=256)
    assert len(measure.asked) == len(set(measure.asked)) < 160  # nothing twice
    assert list(dict.fromkeys(measure.stages)) == [
        "Stage 1 of 10, 10 layers choose", "Stage 2 of 10, 8 layers choose",
        "Stage 3 of 10, 6 layers choose", "Stage 4 of 10, 4 layers choose",
        "Stage 5 of 10, 3 layers choose", "Stage 6 of 10, 2 layers choose",
        "Stage 7 of 10, 1 layer chooses", "Stage 8 of 10, budget 16", "Stage 9 of 10, budget 64",
        "Stage 10 of 10, budget 256",
    ]  # fmt: skip


def test_there_is_a_plan_of_every_size_and_few_layers_are_tried_dense_too():
    points = Search(MODEL, Measuring(), seq_len=1000, value_bytes=4).run([64])
    sizes = {
        len(point.candidate.scored_layers) for point in points if point.candidate.scored_layers
    }
    assert sizes == {10, 8, 6, 4, 3, 2, 1}
    dense = [point.candidate for point in points if point.candidate.select_layers]
    assert {len(candidate.select_layers) for candidate in dense} >= {1, 2, 3}
    assert all(canonical(c.select_layers) == c.select_layers for c in dense)


def test_layers_that_lean_on_each_other_do_not_go_in_one_round():
    """Both of two neighbours may be free alone: the set of one serves the other."""

    def measure(candidates, is_quick, stage):
        return [
            scores(0.01 * (10 - len(c.choosing_layers)) + 5.0 * (not {4, 5} & {*c.choosing_layers}))
            for c in candidates
        ]

    points = Search(MODEL, measure, seq_len=1000, value_bytes=4).run([64])
    assert all(
        {4, 5} & {*point.candidate.choosing_layers}
        for point in points
        if len(point.candidate.choosing_layers) > 1
    )


def test_equal_plans_are_measured_once():
    """A first set of a dense layer that the next layer replaces is read by nobody."""
    for layers, same in {(1, 2, 17): (2, 17), (1, 2, 3): (3,), (2, 16, 17): (2, 16, 17)}.items():
        assert canonical(layers) == same


@pytest.mark.parametrize(("budgets", "most"), [([64], 1), ([64, 128, 256], 2), ([64], 5)])
def test_small_searches(budgets: list[int], most: int):
    measure = Measuring()
    points = Search(MODEL, measure, seq_len=1000, value_bytes=4).run(budgets, most)
    assert {p.candidate.token_budget for p in points} == set(budgets)
    assert max(len(p.candidate.choosing_layers) for p in points) <= most
    smallest = replace(MODEL, num_layers=3)
    points = Search(smallest, measure, seq_len=1000, value_bytes=4).run(budgets, most)
    assert {p.candidate.choosing_layers for p in points} <= {(1, 2), (1,)}


def test_a_model_without_room_for_a_sparse_layer_is_refused():
    search = Search(replace(MODEL, num_layers=2), Measuring(), seq_len=100, value_bytes=4)
    with pytest.raises(UnsupportedError, match="got a model of 2 layers, expected at least 3"):
        search.run([64], 3)


def test_a_step_reads_whole_caches_and_sets():
    row, shadow = 2 * 2 * 16 * 4, 2 * (16 // 2 + 2)
    for options, whole, shadows, sets in (
        ({"select_layers": (2, 5)}, 4, 0, 8),  # FFSssSssssss
        ({"scored_layers": (2, 5)}, 2, 2, 10),  # FFPssPssssss
        ({"select_layers": (2,), "scored_layers": (5,)}, 3, 1, 9),  # FFSssPssssss
        ({}, 12, 0, 0),
    ):
        candidate = Candidate(token_budget=64, **options)
        assert kv_bytes_per_step(MODEL, candidate.config(), 1000, 4) == (
            row * (whole * 1000 + sets * 64) + shadow * shadows * 1000
        )
    short = Candidate(select_layers=(2, 5), token_budget=64)
    assert kv_bytes_per_step(MODEL, short.config(), 30, 4) == row * 12 * 30


def test_the_cheapest_plan_that_is_good_enough_is_chosen():
    points = [
        Point(
            candidate=Candidate(select_layers=(2,), token_budget=cost),
            bytes_per_step=cost,
            scores=scores(loss),
        )
        for cost, loss in ((10, 0.5), (20, 0.6), (30, 0.02), (40, 0.01), (30, 0.03))
    ]
    assert [point.bytes_per_step for point in frontier(points)] == [10, 30, 40]
    assert choose(points, 0.03).bytes_per_step == 30
    assert choose(points, 1.0).bytes_per_step == 10
    assert choose(points, 0.001).bytes_per_step == 40


def test_recents_leave_room_for_the_sinks():
    options = Candidate(select_layers=(2,), token_budget=8, recent_share=1.0, sink_tokens=4)
    assert options.options()["recent_tokens"] == 4
    none = Candidate(select_layers=(3,), token_budget=64, recent_share=0.0).options()
    assert (none["recent_tokens"], none["full_layers"]) == (1, 3)


# Yardstick


def demo_groups(tokenizer: Tokenizer) -> list[Group]:
    windows = make_windows(builtin_text(), tokenizer.encode, (256, 512), count=2, scored_tokens=16)
    source = source_of(tokenizer, contexts=(256, 512))
    answered = [
        Answered(
            context=context,
            prompt_ids=source.question(context, index).prompt_ids,
            token_ids=(11, 12, 13),
            num_answer=2,
        )
        for context in (512, 256)
        for index in range(5)
    ]
    return [*question_groups(answered, "questions"), *text_groups(windows)]


def open_demo(**options) -> Decoder:
    defaults = {"device": "cpu", "num_threads": 1, "attention": "full", "max_seq_len": 512}
    return Decoder(demo_model_dir(), **(defaults | {"max_batch_size": 4} | options))


def test_losses_are_those_of_decode_steps(tokenizer: Tokenizer, tmp_path: Path, monkeypatch):
    groups = demo_groups(tokenizer)
    assert [(g.name, len(g.rows)) for g in groups] == [
        ("questions 256 0", 4), ("questions 256 1", 1), ("questions 512 0", 4),
        ("questions 512 1", 1), ("text 256 0", 2), ("text 512 0", 2),
    ]  # fmt: skip
    plan = Candidate(select_layers=(2, 7), token_budget=32).options()
    everything = {**plan, "token_budget": 512}
    path = tmp_path / "scores.jsonl"
    done: list[int] = []
    # Room for one group alone: every group is read as it comes.
    with open_demo(num_pages=4 * 8) as decoder:
        objective = Objective(decoder, groups, ScoreFile(path), Silent())
        got, whole = objective.measure([plan, everything], done.append)
        (quick,) = objective.measure([plan], done.append, is_quick=True)
        objective.close()
        assert decoder.num_free_pages == 32
    assert (whole.text_kl, whole.answer_kl) == (0, 0) and abs(whole.text_loss) < 1e-6
    assert whole.agreement == 1
    assert done == [*range(1, 13), 1, 2]
    divergent = []
    for group in groups[4:]:
        for row in group.rows:
            prompt = row.prompt_ids
            ids = [*prompt, *row.token_ids[:-1]]
            rows = [
                open_demo(**options).step_logits(ids, prefill=len(prompt))
                for options in ({}, {"attention": "tidal", **plan, "sparse_min_context": 0})
            ]
            divergent.append(divergences(*rows).mean())
    assert got.text_kl == pytest.approx(np.mean(divergent), abs=2e-6) and got.text_kl > 0
    assert quick.text_kl == 0 and quick.answer_kl > 0

    monkeypatch.setattr(objective_module, "OpenGroup", None)  # nothing is decoded again
    again = Objective(decoder, groups, ScoreFile(path), Silent())
    assert again.measure([plan, everything], done.append) == [got, whole]


def test_a_mean_of_contexts_counts_each_alike(tokenizer: Tokenizer):
    """However many questions of each count."""
    objective = Objective(None, demo_groups(tokenizer), ScoreFile(None), Silent())
    objective._score = lambda group, plan: GroupScore(
        loss=0.0, kl=float(group.context), num_same=len(group.rows) * (group.context == 256),
        num_rows=len(group.rows),
    )  # fmt: skip
    (got,) = objective.measure([{}], lambda done: None)
    assert (got.text_kl, got.answer_kl, got.agreement) == (384.0, 384.0, 0.5)


def test_a_model_that_cannot_judge_is_ranked_on_its_longest_texts(tokenizer: Tokenizer):
    texts = demo_groups(tokenizer)[4:]
    objective = Objective(None, texts, ScoreFile(None), Silent())
    assert [group.name for group in objective.quick_groups()] == ["text 512 0"]


def test_logits_that_are_no_numbers_are_an_error(tokenizer: Tokenizer, monkeypatch):
    """They are no score, and nothing is kept of them."""
    (group, *_) = demo_groups(tokenizer)
    scores = ScoreFile(None)
    with open_demo() as decoder:
        objective = Objective(decoder, [group], scores, Silent())
        objective.measure([{"attention": "full"}], lambda done: None)
        step_logits = Replay.step_logits
        monkeypatch.setattr(
            Replay,
            "step_logits",
            lambda *args, **plan: [rows * np.nan for rows in step_logits(*args, **plan)],
        )
        with pytest.raises(TidalError, match="calibrate: the logits after a prompt hold a NaN"):
            objective.measure([{"select_layers": (2,)}], lambda done: None)
    assert len(scores._values) == 1
