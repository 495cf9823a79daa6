"""tidaldecode eval: answers kept of those dense finds, presets, equal bytes, and --interval."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from scripted_model import update_json, write_scripted_model
from tidaldecode import demo_model_dir
from tidaldecode.checkpoint.model_folder import ModelFolder, read_model_folder
from tidaldecode.cli import app as cli
from tidaldecode.errors import InvalidArgument, UnsupportedError
from tidaldecode.evaluation import runner
from tidaldecode.evaluation.costs import StepCosts, cache_dtype
from tidaldecode.evaluation.kept import count_kept, wilson_interval
from tidaldecode.evaluation.markdown import as_markdown
from tidaldecode.evaluation.presets import Comparison, make_presets
from tidaldecode.evaluation.quest import page_bytes_per_step
from tidaldecode.evaluation.report import summarise
from tidaldecode.evaluation.results import Record
from tidaldecode.evaluation.settings import Setting, dense_setting, quest_setting, tidal_setting
from tidaldecode.evaluation.view import show_report
from tidaldecode.plan_bytes import kv_bytes_per_step
from tiny_models import TinyModel, write_checkpoint

ON_CPU = ["--device", "cpu", "--num-threads", "1"]
NAMES = ["all-P", "paper", "lessismore", "quest", "streaming"]
FORCED = {"top_p_mass": 1.0, "min_token_budget": 1, "pooling": "sum", "correction_interval": 0}


def record(index: int, score: float, **changes) -> Record:
    values = {
        "key": "k", "setting": "dense", "plan": "FF", "task": "single", "index": index,
        "context": 512, "depth": None, "score": score, "output": "", "answers": ("x",),
        "prompt_tokens": 500, "output_tokens": 2, "finish_reason": "stop", "same_tokens": 2,
        "kl": 0.0, "set_size": 0.0, "seconds": 0.1,
    }  # fmt: skip
    return Record(**(values | changes))


# Answers kept


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (1, 1, 0.2065493, 1.0),
        (98, 100, 0.9299882, 0.9944980),
    ],
)
def test_wilson_intervals(count: int, total: int, low: float, high: float):
    assert wilson_interval(count, total) == pytest.approx((low, high), abs=1e-6)


def test_ends_of_an_interval_are_shares_as_far_off_as_95_percent_of_samples_are():
    """Its definition: (seen - share)^2 = z^2 share (1 - share) / total."""
    for count, total in ((3, 7), (41, 50), (499, 500)):
        for share in wilson_interval(count, total):
            spread = 1.959964**2 * share * (1 - share) / total
            assert (count / total - share) ** 2 == pytest.approx(spread, rel=1e-5)


def test_only_what_dense_answers_in_full_can_be_kept():
    dense = {r.place: r for r in (record(0, 1.0), record(1, 2 / 3), record(2, 1.0), record(3, 0.0))}
    own = [record(0, 1.0), record(1, 1.0), record(2, 2 / 3), record(3, 1.0)]
    kept = count_kept(own, dense)
    assert (kept.found_by_dense, kept.answers, kept.share) == (2, 1, 0.5)
    assert (kept.low, kept.high) == pytest.approx((0.0945312, 0.9054688), abs=1e-6)
    nothing = count_kept(own[1:2], dense)
    assert (nothing.found_by_dense, nothing.share, nothing.low) == (0, None, None)
    assert nothing.width == 1.0


def shown(summaries, width: int) -> str:
    console = Console(file=StringIO(), width=width)
    show_report(console, summaries, [])
    return console.file.getvalue()


@pytest.mark.parametrize("width", [30, 200])
def test_kept_is_shown_per_task_and_in_all(width: int):
    """At either layout: dense finds two of three needles and no copy."""
    scores = {"single": ((1.0, 1.0, 0.0), (1.0, 0.0, 1.0)), "copy": ((0.5,), (1.0,))}
    records = [
        record(index, score, setting=setting, task=task)
        for column, setting in enumerate(("dense", "tidal select_layers=1"))
        for task, both in scores.items()
        for index, score in enumerate(both[column])
    ]
    summaries = summarise(records)
    cells = [(c.task, c.kept.found_by_dense, c.kept.answers) for c in summaries[1].cells]
    assert cells == [("single", 2, 1), ("copy", 0, 0)]
    assert (summaries[1].kept.found_by_dense, summaries[1].kept.share) == (2, 0.5)
    text = shown(summaries, width)
    assert text.count("50.0 (9.5-90.5)") == 2  # the needle, and all
    assert " - " in text
    table = as_markdown("m|n", summaries, [])
    assert table.startswith("# m\\|n\n")
    assert "| tidal 1 | 66.7 | 50.0 (9.5-90.5) |  |  |" in table
    assert "| tidal 1 | 100.0 | - |  |  |" in table
    assert "3 prompts, of which dense finds 2" in table


@pytest.mark.parametrize("width", [30, 200])
def test_a_setting_that_is_not_run_everywhere_has_no_mean(width: int):
    records = [record(0, 1.0), record(0, 1.0, context=8192)]
    records += [record(0, 0.25, setting="quest K=16")]
    text = shown(summarise(records), width)
    assert text.count("25.0") == 1 and "quest K=16: plan FF" in text


# Bytes


def test_bytes_of_pages(tmp_path: Path):
    model = read_model_folder(write_checkpoint(tmp_path, TinyModel(num_layers=5))).model
    group = model.num_q_heads // model.num_kv_heads
    row = 2 * model.num_kv_heads * model.head_dim * 4
    options = {"token_budget": 40, "page_size": 16}  # two pages a head, of seven
    want = row * (2 * 100 + 3 * (7 + min(100, 32 * group)))
    assert page_bytes_per_step(model, options, 100, "float32") == want
    assert page_bytes_per_step(model, options, 40, "float32") == row * 5 * 40


def test_a_record_costs_what_its_measured_sets_read(tmp_path: Path):
    folder = read_model_folder(write_checkpoint(tmp_path, TinyModel(num_layers=4)))
    half = folder.model.num_kv_heads * folder.model.head_dim * 4
    adaptive = tidal_setting("select_layers=1 token_budget=64 top_p_mass=0.9")
    settings = [dense_setting(), adaptive, quest_setting("token_budget=64")]
    assert cache_dtype(folder, {"device": "cpu"}) == "float32"
    assert cache_dtype(folder, {"device": "cpu", "kv_dtype": "bfloat16"}) == "bfloat16"
    costs = StepCosts(folder, settings, "float32")
    assert costs.of(record(0, 1.0)) == half * 4 * 1024
    sparse = record(0, 1.0, setting=adaptive.name, set_size=20.4)
    assert costs.of(sparse) == half * (2 * 1024 + 2 * 40)
    assert costs.of(replace(sparse, set_size=0.0)) == half * 4 * 1024
    assert costs.of(replace(sparse, context=None)) == half * (2 * 1000 + 2 * 40)
    assert costs.of(replace(sparse, set_size=1e15)) == half * 4 * 1024
    paged = record(0, 1.0, setting=settings[2].name, set_size=64.0)
    assert costs.of(paged) == page_bytes_per_step(folder.model, settings[2].options, 512, "float32")


# Presets


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", TinyModel(num_layers=8))


def by_name(comparison: Comparison) -> dict[str, Setting]:
    return {setting.name: setting for setting in comparison.settings}


def policy(setting: Setting) -> dict:
    """Its options without those that every preset has."""
    common = {"attention": "tidal", "sparse_min_context": 0} | FORCED
    return {k: v for k, v in setting.options.items() if k not in common or common[k] != v}


def test_presets_of_a_model_without_a_plan(model: Path):
    found = make_presets(read_model_folder(model), {512: 512, 2048: 2048}, None, "float32")
    assert (found.token_budget, found.yardstick) == (256, "all-P")
    assert [note for note in found.notes if "no preset `plan`" in note]
    settings = by_name(found)
    names = [f"{name} K=256" for name in NAMES] + [f"{name} bytes=all-P" for name in NAMES]
    assert list(settings) == names
    sets = {"token_budget": 256, "granularity": "layer", "sink_tokens": 4, "recent_tokens": 64}
    assert policy(settings["all-P K=256"]) == sets | {
        "scored_layers": (2, 3, 4, 5, 6, 7), "shadow": "int4", "sink_tokens": 1,
    }  # fmt: skip
    assert policy(settings["lessismore K=256"]) == sets | {"select_layers": (2, 4)}
    assert policy(settings["paper K=256"]) == {
        "select_layers": (2, 4), "token_budget": 256, "granularity": "head", "sink_tokens": 0,
        "recent_tokens": 1,
    }  # fmt: skip
    streaming = settings["streaming K=256"]
    assert policy(streaming) == sets | {"select_layers": (2,), "recent_tokens": 252}
    assert settings["quest K=256"].options == {"token_budget": 256, "page_size": 16}
    assert settings["quest K=256"].is_quest


def test_presets_of_a_model_with_a_plan(model: Path):
    update_json(
        model / "tidal_plan.json", select_layers=[1, 5], token_budget=64, recent_tokens=32,
        sink_tokens=2, granularity="kv_head", pooling="max", correction_interval=9,
    )  # fmt: skip
    folder = read_model_folder(model)
    own = make_presets(folder, {512: 512}, None, "float32")
    assert (own.token_budget, own.yardstick) == (64, "plan")
    settings = by_name(own)
    assert list(settings)[0] == "plan K=64" and list(settings)[6] == "plan bytes=plan"
    # As it is: the same plan as that of a plain evaluation.
    assert settings["plan K=64"].plan(folder) == tidal_setting("").plan(folder)
    larger = by_name(make_presets(folder, {512: 512}, 128, "float32"))["plan K=128"]
    larger = larger.plan(folder).config
    assert (larger.token_budget, larger.recent_tokens, larger.sink_tokens) == (128, 64, 2)
    assert (larger.select_layers, larger.granularity) == ((1, 5), "kv_head")
    assert settings["paper K=64"].options["select_layers"] == (1, 5)
    # Nothing of the model's plan is left in another preset.
    other = settings["lessismore K=64"].plan(folder).config
    assert (other.pooling, other.correction_interval, other.sink_tokens) == ("sum", 0, 4)


def test_presets_of_plans_without_select_layers_or_a_fixed_budget(model: Path):
    update_json(model / "tidal_plan.json", scored_layers=[1, 4], token_budget="auto")
    folder = read_model_folder(model)
    found = make_presets(folder, {9000: 9000}, None, "float32")
    assert any("the plan's budget is adaptive: K=4096" in note for note in found.notes)
    settings = by_name(found)
    assert settings["plan K=4096"].plan(folder).config.token_budget == "auto"
    assert settings["paper K=4096"].options["select_layers"] == (2, 4)
    smaller = by_name(make_presets(folder, {9000: 9000}, 100, "float32"))["plan K=100"]
    smaller = smaller.plan(folder).config
    assert (smaller.token_budget, smaller.top_p_mass) == (100, 0.98)
    assert smaller.scored_layers == (1, 4) and smaller.select_layers is None


def bytes_of(folder: ModelFolder, setting: Setting, seq_len: int, **changes) -> int:
    if setting.is_quest:
        return page_bytes_per_step(folder.model, setting.options | changes, seq_len, "float32")
    config = setting.plan(folder).config
    return kv_bytes_per_step(folder.model, replace(config, **changes), seq_len, "float32")


@pytest.mark.parametrize("has_plan", [True, False])
@pytest.mark.parametrize("asked", [64, 400])
def test_budgets_of_equal_bytes(model: Path, has_plan: bool, asked: int):
    """Nearest to the yardstick of all budgets; a note wherever that is not within 1 %."""
    if has_plan:
        update_json(model / "tidal_plan.json", select_layers=[2, 7], token_budget=32)
    folder = read_model_folder(model)
    found = make_presets(folder, {1000: 1000, 3000: 3000}, asked, "float32")
    yardstick = by_name(found)[f"{found.yardstick} K={asked}"]
    equal = [setting for setting in found.settings if " bytes=" in setting.name]
    assert len(equal) == 2 * (5 + has_plan)
    num_notes = 0
    for setting in equal:
        (n,) = setting.contexts
        target, got = bytes_of(folder, yardstick, n), bytes_of(folder, setting, n)
        step = 16 if setting.is_quest else 1
        best = min(
            abs(bytes_of(folder, setting, n, token_budget=budget) - target)
            for budget in range(16, n, step)
        )
        assert abs(got - target) == best, setting.name
        is_noted = any(
            note.startswith(f"{setting.name.split()[0]} at {n:,} tokens") for note in found.notes
        )
        assert is_noted == (best > 0.01 * target)
        num_notes += is_noted
    # What has dense layers cannot read as little as shadows and small sets.
    assert num_notes < len(equal) / 2 or (asked == 64 and not has_plan)
    own = next(setting for setting in equal if setting.name.startswith(found.yardstick))
    assert own.plan(folder) == yardstick.plan(folder)


def test_a_preset_that_reads_more_whatever_its_budget_gets_the_least(model: Path):
    update_json(model / "tidal_plan.json", select_layers=[1], token_budget=16)
    folder = read_model_folder(model)
    found = make_presets(folder, {4000: 4000}, None, "float32")
    assert by_name(found)["all-P bytes=plan"].options["token_budget"] == 16
    assert any(note.startswith("all-P at 4,000 tokens: ") for note in found.notes)


def test_pages_are_for_short_contexts_and_plain_positions(tmp_path: Path, model: Path):
    found = make_presets(read_model_folder(model), {4096: 4096, 8192: 8192}, None, "float32")
    paged = [setting for setting in found.settings if setting.is_quest]
    assert [setting.contexts for setting in paged] == [(4096,), (4096,)]
    assert paged[0].runs_at(4096) and not paged[0].runs_at(8192)
    assert any("only at contexts up to 4,096 tokens" in note for note in found.notes)
    scaled = write_checkpoint(tmp_path / "yarn", TinyModel(num_layers=8, rope="yarn"))
    found = make_presets(read_model_folder(scaled), {512: 512}, None, "float32")
    assert not any(setting.is_quest for setting in found.settings)
    assert any("no preset `quest`" in note and "yarn" in note for note in found.notes)


def test_presets_that_cannot_be(tmp_path: Path, model: Path):
    with pytest.raises(InvalidArgument, match="token_budget: got 8, expected at least 16"):
        make_presets(read_model_folder(model), {512: 512}, 8, "float32")
    small = read_model_folder(write_checkpoint(tmp_path / "two", TinyModel(num_layers=2)))
    with pytest.raises(UnsupportedError, match="compare: got a model of 2 layers"):
        make_presets(small, {512: 512}, None, "float32")


# The command


def evaluate(folder: Path, out: Path, *arguments: str) -> int:
    return cli.main(["eval", str(folder), *ON_CPU, "--out", str(out), *arguments])


def report_in(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_presets_at_two_contexts_do_not_mix(tmp_path: Path, capsys, monkeypatch):
    """One name, other options at every context: together as each alone, and found again."""
    task = ["--task", "single", "--limit", "1", "--compare", "presets", "--token-budget", "32"]
    both = ["--context", "300", "--context", "500"]
    assert evaluate(demo_model_dir(), tmp_path / "both", *task, *both) == 0
    first = capsys.readouterr().out
    together = {entry["setting"]: entry for entry in report_in(tmp_path / "both")["settings"]}
    for index, context in enumerate((300, 500)):
        out = tmp_path / str(context)
        assert evaluate(demo_model_dir(), out, *task, "--context", str(context)) == 0
        for entry in report_in(out)["settings"]:
            assert entry["cells"] == [together[entry["setting"]]["cells"][index]]
    short, long = together["streaming bytes=plan"]["contexts"]
    assert 32 < short["set_size"] < long["set_size"]
    target = [cell["kv_bytes"] for cell in together["plan K=32"]["contexts"]]
    assert [short["kv_bytes"], long["kv_bytes"]] == pytest.approx(target, rel=0.01)
    # Settings that come to the same are decoded once.
    keys = [json.loads(line)["key"] for line in open(tmp_path / "both" / "results.jsonl")]
    assert len(set(keys)) == len(keys) < 2 * len(together)
    monkeypatch.setattr(runner, "Decoder", None)
    capsys.readouterr()
    assert evaluate(demo_model_dir(), tmp_path / "both", *task, *both) == 0
    assert capsys.readouterr().out == first
    assert "| all-P K=32 |" in (tmp_path / "both" / "report.md").read_text()


@pytest.fixture
def scripted(tmp_path: Path) -> Path:
    return write_scripted_model(tmp_path / "scripted", max_position_embeddings=2048)


def own_prompts(tmp_path: Path, answers: list[str]) -> list[str]:
    path = tmp_path / "own.jsonl"
    lines = [
        json.dumps({"prompt": f"number {index} of all of these >", "answers": [answer]})
        for index, answer in enumerate(answers)
    ]
    path.write_text("\n".join(lines))
    return ["--prompts", str(path), "--tidal", "select_layers=1 token_budget=16"]


@pytest.mark.parametrize(
    ("answers", "extra", "expected"),
    [
        # All kept: an interval is 3.84 / (n + 3.84) wide, at most 0.2 from 16 answers on.
        (["STOP"] * 40, ["--interval", "0.2"], 16),
        # Every second is one that dense finds.
        (["STOP", "no"] * 25, ["--interval", "0.2"], 31),
        (["STOP"] * 40, ["--interval", "0.9"], 10),
        (["STOP"] * 40, ["--interval", "0.2", "--limit", "12"], 12),
        (["STOP"] * 40, ["--interval", "0.9", "--limit", "4"], 4),
        (["STOP"] * 13, ["--interval", "0.1"], 13),
        (["no"] * 20, ["--interval", "0.9"], 20),
    ],
)
def test_prompts_are_asked_until_enough_is_known(
    scripted: Path, tmp_path: Path, capsys, answers: list[str], extra: list[str], expected: int
):
    arguments = [*own_prompts(tmp_path, answers), *extra]
    assert evaluate(scripted, tmp_path / "out", *arguments) == 0
    out = capsys.readouterr().out
    report = report_in(tmp_path / "out")
    assert report["asked"] == expected and report["interval"] == float(extra[1])
    assert [entry["cells"][0]["num_prompts"] for entry in report["settings"]] == [expected] * 2
    assert f"Asked {expected} prompts for intervals" in out
    kept = report["settings"][1]["kept"]
    width = kept["high"] - kept["low"] if kept["share"] is not None else 1.0
    assert ("still wider: own" in out) == (width > float(extra[1]))


def test_a_setting_that_loses_answers_is_asked_until_its_interval_is_narrow(tmp_path: Path, capsys):
    streaming = "select_layers=2 token_budget=128 sink_tokens=4 recent_tokens=124"
    arguments = [
        "--task", "multikey", "--context", "400", "--interval", "0.45", "--limit", "30", "--tidal",
        "select_layers=2,7 token_budget=200", "--tidal", streaming,
    ]  # fmt: skip
    assert evaluate(demo_model_dir(), tmp_path, *arguments) == 0
    first = capsys.readouterr().out
    dense, near, far = report_in(tmp_path)["settings"]
    asked = dense["cells"][0]["num_prompts"]
    results = tmp_path / "results.jsonl"
    records = [json.loads(line) for line in results.read_bytes().splitlines()]
    assert near["kept"]["share"] > far["kept"]["share"] > 0

    def width(num_prompts: int) -> float:
        own = [r for r in records if r["setting"] == far["setting"]][:num_prompts]
        low, high = wilson_interval(sum(r["score"] for r in own), num_prompts)
        return high - low

    assert dense["mean_score"] == 1.0 and 10 < asked < 30
    assert width(asked) <= 0.45 < width(asked - 1)
    # A run that was cut off asks the same.
    results.write_bytes(b"".join(results.read_bytes().splitlines(keepends=True)[: 3 * 5 + 1]))
    assert evaluate(demo_model_dir(), tmp_path, *arguments) == 0
    assert capsys.readouterr().out == first
    assert len(results.read_bytes().splitlines()) == 3 * asked


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--compare", "all"], "compare: got 'all', expected 'presets'"),
        (["--token-budget", "64"], "token-budget: got it without --compare presets"),
        (["--compare", "presets", "--token-budget", "0"], "token_budget: got 0"),
        (["--compare", "presets", "--token-budget", "15"], "expected at least 16"),
        (["--interval", "0"], "interval: got 0.0, expected a width between 0 and 1"),
        (["--interval", "1"], "interval: got 1.0"),
        (["--interval", "nan"], "interval: got nan"),
        (["--interval", "-0.1"], "interval: got -0.1"),
        (["--interval", "0.1", "--text", __file__], "interval: got it with a text alone"),
        (["--interval", "0.1", "--context", "64"], "context: got room for"),
    ],
)
def test_wrong_values_are_one_line(scripted: Path, tmp_path, capsys, arguments, expected: str):
    assert evaluate(scripted, tmp_path / "out", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.rstrip("\n").split("\n")[-1]
    assert last.startswith("error: ") and expected in last


def test_presets_of_own_prompts_and_of_a_text(scripted: Path, tmp_path: Path, capsys):
    """Own prompts have no context: bytes count at their mean length."""
    arguments = own_prompts(tmp_path, ["STOP", "STOP", "no"])[:2]
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij klm nop " * 40)
    both = ["--text", str(text), "--context", "200", "--scored-tokens", "8", "--limit", "2"]
    presets = ["--compare", "presets", "--token-budget", "16"]
    assert evaluate(scripted, tmp_path / "out", *arguments, *both, *presets) == 0
    report = report_in(tmp_path / "out")
    assert [entry["setting"] for entry in report["compare"]["settings"]][:2] == [
        "all-P K=16", "paper K=16",
    ]  # fmt: skip
    contexts = {tuple(entry["contexts"]) for entry in report["compare"]["settings"]}
    assert contexts == {(), (None,), (200,), (None, 200)}
    assert all(entry["kept"]["share"] == 1.0 for entry in report["settings"])
    assert len(report["settings"]) == len(report["perplexity"]) == 11
    assert all(entry["kv_bytes"] > 0 for entry in report["perplexity"])
    assert "## Perplexity" in (tmp_path / "out" / "report.md").read_text()
