"""tidaldecode calibrate: its search and its yardstick."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tidaldecode import Decoder, demo_model_dir
from tidaldecode.calibration.data import QuestionSource, builtin_text
from tidaldecode.calibration.objective import (
    Group,
    GroupScore,
    Objective,
    Scores,
    question_groups,
    text_groups,
)
from tidaldecode.calibration.open_prompts import OpenPrompts
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
from tidaldecode.errors import CapacityError, InvalidArgument, TidalError, UnsupportedError
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


def scores(loss: float, set_size: float = 0.0) -> Scores:
    return Scores(text_loss=loss, text_kl=loss, answer_kl=0.0, agreement=1.0, set_size=set_size)


def planted(candidate: Candidate) -> Scores:
    """Least at layers 2, 5 and 9, recents of a quarter, one sink, one set for all heads."""
    loss = 0.1 * sum(best not in candidate.choosing_layers for best in (2, 5, 9))
    loss += 10.0 / candidate.token_budget + 0.001 * len(candidate.select_layers)
    loss += 0.1 * abs(candidate.recent_share - 0.25) + 0.01 * candidate.sink_tokens
    loss += 0.2 * (candidate.top_p_mass is not None)
    return scores(loss + 0.1 * (candidate.granularity != "layer"), candidate.token_budget)


BEST = Candidate(scored_layers=(1, 2, 5, 9), token_budget=256)


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
    points = Search(MODEL, measure, seq_len=1000, kv_dtype="float32").run([16, 64, 256])
    assert choose(points, planted(BEST).loss).candidate == BEST
    assert len(measure.asked) == len(set(measure.asked)) < 260  # nothing twice
    assert sum(not is_quick for _, is_quick in measure.asked) < 60
    assert list(dict.fromkeys(measure.stages)) == [
        "Stage 1 of 10, 11 layers choose", "Stage 2 of 10, 8 layers choose",
        "Stage 3 of 10, 6 layers choose", "Stage 4 of 10, 4 layers choose",
        "Stage 5 of 10, 3 layers choose", "Stage 6 of 10, 2 layers choose",
        "Stage 7 of 10, 1 layer chooses", "Stage 8 of 10, settings at budget 64",
        "Stage 9 of 10, budgets", "Stage 10 of 10, the best of all",
    ]  # fmt: skip


def test_only_plans_near_the_loss_that_is_allowed_are_measured_on_everything():
    """The same plan is found as where all that are worth it are measured."""
    chosen = []
    num_measured = []
    limit = planted(replace(BEST, token_budget=64)).loss
    for max_loss in (limit, math.inf):
        measure = Measuring()
        search = Search(MODEL, measure, seq_len=1000, kv_dtype="float32")
        points = search.run([4, 16, 64, 256, 1024, 4096], max_loss=max_loss)
        chosen.append(choose(points, limit))
        num_measured.append(sum(not is_quick for _, is_quick in measure.asked))
        assert len(points) == num_measured[-1]
    assert chosen[0] == chosen[1] and num_measured[0] < num_measured[1]


def test_where_none_near_it_is_within_the_loss_all_are_measured():
    """Ranking may be wrong by any factor."""

    def measure(candidates, is_quick, stage):
        return [scores(planted(c).loss * (1 if is_quick else 20)) for c in candidates]

    budgets = [16, 64, 256, 1024]
    limit = planted(replace(BEST, token_budget=64)).loss
    every = Search(MODEL, measure, seq_len=1000, kv_dtype="float32").run(budgets)
    found = Search(MODEL, measure, seq_len=1000, kv_dtype="float32").run(budgets, max_loss=limit)
    assert choose(found, limit) == choose(every, limit)


def test_a_budget_that_adapts_counts_with_the_sets_that_it_takes():
    """It is chosen where it reads less for the same loss."""

    def measure(candidates, is_quick, stage):
        found = []
        for own in candidates:
            mass = own.top_p_mass
            size = own.token_budget if mass is None else 2000 * (mass - 0.85)
            loss = 10 / size if mass is None else 5 / size
            found.append(scores(loss + 0.1 * (2 not in own.choosing_layers), size))
        return found

    search = Search(MODEL, measure, seq_len=1000, kv_dtype="float32")
    points = search.run([64, 256], max_loss=5 / 199)
    best = choose(points, 5 / 199)
    assert best.candidate.top_p_mass == 0.95 and best.candidate.token_budget == 256
    fixed = replace(best.candidate, top_p_mass=None, token_budget=200)
    assert best.bytes_per_step == kv_bytes_per_step(MODEL, fixed.config(), 1000, "float32")
    options = best.candidate.options()
    assert (options["top_p_mass"], options["min_token_budget"]) == (0.95, 64)
    assert options["sink_tokens"] + options["recent_tokens"] <= 64


def test_settings_are_each_plans_own():
    """Many layers that choose want sets for every KV head, few want sets for all heads."""

    def measure(candidates, is_quick, stage):
        return [
            scores(
                0.02 * (12 - len(c.choosing_layers))
                + (c.top_p_mass is not None)
                + 0.05 * ((len(c.choosing_layers) > 5) != (c.granularity == "kv_head"))
                + 0.1 * abs(c.recent_share - 0.5)
            )
            for c in candidates
        ]

    points = Search(MODEL, measure, seq_len=1000, kv_dtype="float32").run([64])
    points = [point for point in points if point.candidate.top_p_mass is None]
    settings = {len(p.candidate.choosing_layers): p.candidate.granularity for p in points}
    assert settings[11] == "kv_head" and settings[1] == "layer"
    assert {point.candidate.recent_share for point in points} == {0.5}


def test_there_is_a_plan_of_every_size_and_few_layers_are_tried_dense_too():
    measure = Measuring()
    points = Search(MODEL, measure, seq_len=1000, kv_dtype="float32").run([64])
    sizes = {
        len(point.candidate.scored_layers) for point in points if point.candidate.scored_layers
    }
    assert sizes >= {11, 8, 6, 4, 3, 2, 1}
    dense = [candidate for candidate, _ in measure.asked if candidate.select_layers]
    assert {len(candidate.select_layers) for candidate in dense} >= {1, 2, 3}
    assert all(canonical(c.select_layers) == c.select_layers for c in dense)


def test_layers_that_lean_on_each_other_do_not_go_in_one_round():
    """Both of two neighbours may be free alone: the set of one serves the other."""

    def measure(candidates, is_quick, stage):
        return [
            scores(0.01 * (10 - len(c.choosing_layers)) + 5.0 * (not {4, 5} & {*c.choosing_layers}))
            for c in candidates
        ]

    points = Search(MODEL, measure, seq_len=1000, kv_dtype="float32").run([64])
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
    points = Search(MODEL, measure, seq_len=1000, kv_dtype="float32").run(budgets, most)
    assert {p.candidate.token_budget for p in points} <= set(budgets)
    assert max(len(p.candidate.choosing_layers) for p in points) <= most
    smallest = replace(MODEL, num_layers=3)
    points = Search(smallest, measure, seq_len=1000, kv_dtype="float32").run(budgets, most)
    assert {p.candidate.choosing_layers for p in points} <= {(1, 2), (1,), (2,)}


def test_a_model_without_room_for_a_sparse_layer_is_refused():
    search = Search(replace(MODEL, num_layers=2), Measuring(), seq_len=100, kv_dtype="float32")
    expected = "got a model with 1 layers behind the first, expected at least 2"
    with pytest.raises(UnsupportedError, match=expected):
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
        assert kv_bytes_per_step(MODEL, candidate.config(), 1000, "float32") == (
            row * (whole * 1000 + sets * 64) + shadow * shadows * 1000
        )
    short = Candidate(select_layers=(2, 5), token_budget=64)
    assert kv_bytes_per_step(MODEL, short.config(), 30, "float32") == row * 12 * 30


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
    hardly_more = [replace(point, bytes_per_step=1000 + i) for i, point in enumerate(points)]
    assert choose(hardly_more, 1.0).scores.loss == 0.01


def test_recents_leave_room_for_the_sinks():
    options = Candidate(select_layers=(2,), token_budget=8, recent_share=1.0, sink_tokens=4)
    assert options.options()["recent_tokens"] == 4
    none = Candidate(select_layers=(3,), token_budget=64, recent_share=0.0).options()
    assert (none["recent_tokens"], none["full_layers"]) == (1, 3)


# Yardstick


def demo_groups(tokenizer: Tokenizer) -> list[Group]:
    windows = [
        window
        for context in (256, 512)
        for window in make_windows(
            builtin_text(), tokenizer.encode, [context], count=2, scored_tokens=64
        )
    ]
    source = source_of(tokenizer, contexts=(256, 512))
    answered = []
    for context, index in ((512, 0), (256, 4), (512, 1)):
        document = source.document(context, index)
        outputs = [([11, 12, 13], 2), ([], 0), ([14], 1)][: len(document.questions)]
        outputs += [([15, 16], 1)] * (len(document.questions) - len(outputs))
        answered.append(
            Answered(name=f"q {context} {index}", document=document, outputs=tuple(outputs))
        )
    return [*question_groups(answered), *text_groups(windows)]


def open_demo(**options) -> Decoder:
    """With a cache in which a value does not depend on the chunk that it was read in."""
    defaults = {"device": "cpu", "num_threads": 1, "attention": "full", "max_seq_len": 512}
    defaults |= {"max_batch_size": 12, "kv_dtype": "float32"}
    return Decoder(demo_model_dir(), **(defaults | options))


def test_texts_are_scored_at_several_places_of_a_window(tokenizer: Tokenizer):
    (window,) = make_windows(builtin_text(), tokenizer.encode, [512], count=1, scored_tokens=128)
    (group,) = text_groups([window])
    whole = (*window.prompt_ids, *window.scored_ids)
    assert len(group.rows) == 3 and group.room == 32
    ends = []
    for row in group.rows:
        end = len(row.prompt_ids) + len(row.token_ids)
        assert (*row.prompt_ids, *row.token_ids) == whole[:end]
        ends.append(end)
    assert ends == [416, 464, 512]


def test_losses_are_those_of_decode_steps(tokenizer: Tokenizer, tmp_path: Path, monkeypatch):
    groups = demo_groups(tokenizer)
    assert [g.name for g in groups] == [
        "q 512 0", "q 256 4", "q 512 1", "text 256 0", "text 256 1", "text 512 0", "text 512 1",
    ]  # fmt: skip
    plan = Candidate(select_layers=(2, 7), token_budget=32).options()
    everything = {**plan, "token_budget": 512}
    path = tmp_path / "scores.jsonl"
    done: list[int] = []
    # Room for one group alone: every group is read as it comes.
    with open_demo(num_pages=32) as decoder:
        prompts = OpenPrompts(decoder, Silent())
        objective = Objective(prompts, groups, ScoreFile(path))
        got, whole = objective.measure([plan, everything], done.append)
        (quick,) = objective.measure([plan], done.append, is_quick=True)
        prompts.close()
        assert decoder.num_free_pages == 32
    assert (whole.text_kl, whole.answer_kl) == (0, 0) and abs(whole.text_loss) < 1e-6
    assert whole.agreement == 1
    assert done == [*range(1, 15), 1, 2, 3]
    means = {}
    for is_text in (True, False):
        rows_of = {256: [], 512: []}
        for group in groups:
            for row in group.rows:
                if group.is_text != is_text or not row.token_ids:
                    continue
                ids = [*row.prompt_ids, *row.token_ids[:-1]]
                rows = [
                    open_demo(**options).step_logits(ids, prefill=len(row.prompt_ids))
                    for options in ({}, {"attention": "tidal", **plan, "sparse_min_context": 0})
                ]
                rows_of[group.context].append(divergences(*rows).mean())
        means[is_text] = {context: np.mean(own) for context, own in rows_of.items()}
    found = (got.text_kl, got.answer_kl)
    assert min(found) > 0 and any(
        found == pytest.approx((means[True][context], means[False][context]), rel=1e-4, abs=5e-6)
        for context in (256, 512)
    )
    assert quick.answer_kl > 0 and quick != got

    monkeypatch.setattr(OpenPrompts, "open", None)  # nothing is decoded again
    again = Objective(prompts, groups, ScoreFile(path))
    assert again.measure([plan, everything], done.append) == [got, whole]


def test_the_context_that_loses_most_counts(tokenizer: Tokenizer):
    """However many questions of each there are: a short one must not hide a long one's loss."""
    objective = Objective(None, demo_groups(tokenizer), ScoreFile(None))
    objective._score = lambda group, plan: GroupScore(
        loss=0.0, kl=group.context / 1000 + group.is_text, num_rows=len(group.rows),
        num_same=len(group.rows) * (group.context == plan["good"]),
        set_size=100.0 + group.context,
    )  # fmt: skip
    long, short = objective.measure([{"good": 256}, {"good": 512}], lambda done: None)
    assert (long.text_kl, long.answer_kl, long.agreement) == (1.512, 0.512, 0.0)
    assert (short.text_kl, short.answer_kl, short.agreement) == (1.256, 0.256, 0.0)
    assert (long.set_size, short.set_size) == (612.0, 612.0)  # where bytes count


def test_plans_are_ranked_on_a_document_of_each_context_and_a_long_text(tokenizer: Tokenizer):
    groups = demo_groups(tokenizer)
    quick = Objective(None, groups, ScoreFile(None)).quick_groups()
    assert [(g.is_text, g.context) for g in quick] == [(False, 512), (False, 256), (True, 512)]
    asked = [group for group in groups if group.context == 512 and not group.is_text]
    assert quick[0].num_judged == max(group.num_judged for group in asked)
    texts = Objective(None, groups[3:], ScoreFile(None)).quick_groups()
    assert [group.name for group in texts] == ["text 512 0"]


def test_prompts_that_have_no_room_are_read_again(tokenizer: Tokenizer):
    """The one used last makes room; what can never fit is an error."""
    prompt = list(range(10, 410))
    others = [[token + shift for token in prompt] for shift in (500, 1000)]
    with open_demo(num_pages=16) as decoder:
        prompts = OpenPrompts(decoder, Silent())
        first = prompts.open("first", [prompt], 16)
        second = prompts.open("second", [others[0]], 16)
        assert prompts.open("first", [prompt], 16) is first
        assert prompts.open("second", [others[0]], 16) is second
        third = prompts.open("third", [others[1]], 16)
        assert prompts.open("third", [others[1]], 16) is third
        assert prompts.open("first", [prompt], 16) is first
        with pytest.raises(InvalidArgument, match="closed"):
            second.greedy(1)
        with pytest.raises(CapacityError):
            prompts.open("all", [prompt, *others], 16)
        prompts.close()
        assert decoder.num_free_pages == 16


def test_logits_that_are_no_numbers_are_an_error(tokenizer: Tokenizer, monkeypatch):
    """They are no score, and nothing is kept of them."""
    (group, *_) = demo_groups(tokenizer)
    scores = ScoreFile(None)
    with open_demo() as decoder:
        objective = Objective(OpenPrompts(decoder, Silent()), [group], scores)
        objective.measure([{"attention": "full"}], lambda done: None)
        step_logits = Replay.step_logits
        for wrong in (np.nan, np.inf, -np.inf):

            def with_one(*args, wrong=wrong, **plan) -> list[np.ndarray]:
                logits = step_logits(*args, **plan)
                logits[0][0, 7] = wrong
                return logits

            monkeypatch.setattr(Replay, "step_logits", with_one)
            with pytest.raises(TidalError, match="calibrate: the logits after a prompt hold a NaN"):
                objective.measure([{"select_layers": (2,)}], lambda done: None)
    assert len(scores._values) == 1
