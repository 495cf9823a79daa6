"""Every public name and every command, each used once: what test_features.py runs on every device.

A function here uses what its decorator names, on the device and in the dtype of its `Bench`, and
asserts what a caller would see. That numbers are right is the business of other tests.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import tidaldecode
from retrieval_prompts import manual_text
from tidaldecode.cli import app

PROMPT = "The sky over the harbour was"
IDS = list(range(5, 45))
# A plan that decodes sparsely from the first token on.
PLAN = {"select_layers": (2, 7), "token_budget": 32, "sparse_min_context": 0}


@dataclass
class Bench:
    """A device and a dtype, a folder for files, and how a test opens decoders and runs commands."""

    device: str
    dtype: str
    folder: Path
    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    _decoders: list[tidaldecode.Decoder] = field(default_factory=list)

    @property
    def model(self) -> Path:
        return tidaldecode.demo_model_dir()

    def open(self, **options) -> tidaldecode.Decoder:
        """A decoder of the demo model; closed with the bench."""
        # One thread: the machine that runs the tests may have other work.
        settings = {"max_seq_len": 512, "max_batch_size": 4, "num_threads": 1} | options
        decoder = tidaldecode.Decoder(self.model, device=self.device, dtype=self.dtype, **settings)
        self._decoders.append(decoder)
        return decoder

    def command(self, *arguments: str, on_device: bool = True) -> str:
        """What a command writes to stdout; it must end well. on_device: it is told the device."""
        place = ["--device", self.device, "--dtype", self.dtype, "--debug"] if on_device else []
        code = app.main([*arguments, *place])
        captured = self.capsys.readouterr()
        assert code == 0, captured.err
        used_options.setdefault(arguments[0], set()).update(
            word for word in (*arguments, *place) if word.startswith("-")
        )
        return captured.out

    def type(self, text: str) -> None:
        """What the next command reads from stdin."""
        self.monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    def cache_model(self, repo: str) -> None:
        """Puts the model where the hub's library keeps one by its name."""
        folder = self.folder / "hub" / f"models--{repo.replace('/', '--')}"
        (folder / "snapshots").mkdir(parents=True)
        (folder / "snapshots" / ("a" * 40)).symlink_to(self.model)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("a" * 40)
        self.monkeypatch.setenv("HF_HUB_CACHE", str(self.folder / "hub"))

    def close(self) -> None:
        for decoder in self._decoders:
            decoder.close()


used_options: dict[str, set[str]] = {}  # by command, over all runs so far
Run = Callable[[Bench], None]
RUNS: dict[str, Run] = {}
NAMES: dict[str, str] = {}  # public name -> the run that uses it


def uses(*names: str) -> Callable[[Run], Run]:
    """Says which public names and commands a run uses."""

    def register(run: Run) -> Run:
        RUNS[run.__name__] = run
        for name in names:
            NAMES[name] = run.__name__
        return run

    return register


# Decoder


@uses("Decoder.generate", "GenerationResult", "Timings")
def generate(bench: Bench) -> None:
    decoder = bench.open()
    result = decoder.generate(PROMPT, max_new_tokens=8)
    assert isinstance(result, tidaldecode.GenerationResult)
    assert result.text and len(result.token_ids) <= 8
    assert isinstance(result.timings, tidaldecode.Timings)
    several = decoder.generate([PROMPT, "Configuration files are", IDS], max_new_tokens=4)
    assert [bool(one.text) for one in several] == [True] * 3
    drawn = [
        decoder.generate(
            IDS, max_new_tokens=8, temperature=0.9, top_k=50, top_p=0.9, min_p=0.01, seed=7,
            repetition_penalty=1.1, stop=["\n\n\n"], stop_token_ids=[0], ignore_eos=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert drawn[0].token_ids == drawn[1].token_ids
    assert 14 in decoder.generate(
        IDS, allowed_token_ids=[14, 15], min_new_tokens=2, max_new_tokens=8, frequency_penalty=1,
        presence_penalty=1, no_repeat_ngram_size=3, logit_bias={14: 90}, suppress_tokens=[3],
        bad_words=["w", [5, 6]]).token_ids  # fmt: skip


@uses("Decoder.stream", "TextStream", "TextStream.close")
def stream(bench: Bench) -> None:
    decoder = bench.open()
    read: list[tuple[int, int]] = []
    with decoder.stream(
        IDS, max_new_tokens=8, on_prefill=lambda *now: read.append(now), ignore_eos=True
    ) as pieces:
        assert isinstance(pieces, tidaldecode.TextStream)
        text = "".join(pieces)
    assert pieces.result.text == text and read[-1] == (len(IDS), len(IDS))
    left = decoder.stream(IDS, max_new_tokens=8, ignore_eos=True)
    next(left)
    left.close()
    assert left.result.finish_reason == "abort"


@uses("Decoder.encode", "Decoder.decode")
def encode_and_decode(bench: Bench) -> None:
    decoder = bench.open()
    assert PROMPT in decoder.decode(decoder.encode(PROMPT))


@uses("skip_special_tokens", "add_special_tokens", "include_stop_str_in_output")
def special_tokens_and_stop_strings(bench: Bench) -> None:
    decoder = bench.open()
    bare = decoder.encode(PROMPT, add_special_tokens=False)
    whole = decoder.encode(PROMPT)
    assert whole[-len(bare) :] == bare and len(whole) > len(bare)
    assert decoder.decode(whole, skip_special_tokens=False) != decoder.decode(whole)
    options = {"max_new_tokens": 24, "add_special_tokens": False, "skip_special_tokens": False}
    text = decoder.generate(PROMPT, **options).text
    stop = text[2:5]
    cut = decoder.generate(PROMPT, stop=stop, **options)
    kept = decoder.generate(PROMPT, stop=stop, include_stop_str_in_output=True, **options)
    assert (cut.stop_reason, kept.text) == (stop, cut.text + stop)


@uses("prompts as arrays")
def arrays(bench: Bench) -> None:
    decoder = bench.open()
    expected = decoder.generate(IDS, max_new_tokens=4).token_ids
    for prompt in (np.array(IDS), np.array(IDS, np.uint16), {"input_ids": IDS}, range(5, 45)):
        assert decoder.generate(prompt, max_new_tokens=4).token_ids == expected
    assert len(decoder.generate(np.array([IDS, IDS]), max_new_tokens=2)) == 2


@uses("Decoder.chat", "Decoder.chat_stream", "Decoder.render_chat")
def chat(bench: Bench) -> None:
    decoder = bench.open()
    messages = [{"role": "user", "content": "Hello"}]
    assert len(decoder.render_chat(messages)) > len(decoder.encode("Hello"))
    answer = decoder.chat(messages, max_new_tokens=4)
    assert "".join(decoder.chat_stream(messages, max_new_tokens=4)) == answer.text
    both = decoder.chat([messages, messages], max_new_tokens=4)
    assert [one.text for one in both] == [answer.text] * 2
    plain = decoder.render_chat(messages, add_generation_prompt=False)
    assert decoder.render_chat(messages)[: len(plain)] == plain
    own = "{{ messages[0].content }}{{ tools | tojson }}{{ mood }}"
    ids = decoder.render_chat(messages, chat_template=own, tools=[{"name": "f"}], mood="calm")
    assert decoder.decode(ids) == 'Hello[{"name": "f"}]calm'


@uses("Decoder.session")
def open_session(bench: Bench) -> None:
    with bench.open().session(max_seq_len=128) as session:
        assert isinstance(session, tidaldecode.Session) and session.max_seq_len == 128


@uses("Decoder.selection")
def selection(bench: Bench) -> None:
    decoder = bench.open(**PLAN)
    decoder.generate(IDS * 2, max_new_tokens=4, ignore_eos=True)
    chosen = decoder.selection()
    assert sorted(chosen) == [2, 7] and chosen[2].shape[-1] == 32


@uses("Decoder.logits", "Decoder.step_logits")
def logits(bench: Bench) -> None:
    decoder = bench.open()
    vocab_size = decoder.model.vocab_size
    assert decoder.logits(IDS, last=3).shape == (3, vocab_size)
    rows = decoder.step_logits(IDS, prefill=30)
    assert rows.shape == (11, vocab_size) and np.isfinite(rows).all()


@uses(
    "Decoder.replay", "Replay.read", "Replay.step_logits", "Replay.greedy",
    "Replay.mean_set_size", "Replay.close",
)  # fmt: skip
def replay(bench: Bench) -> None:
    decoder = bench.open()
    with decoder.replay([IDS * 2, IDS], max_new_tokens=8) as prompts:
        prompts.read()
        dense = prompts.greedy(8, attention="full")
        (first, _) = prompts.step_logits([dense[0][:3], []], **PLAN)
        assert first.shape == (4, decoder.model.vocab_size)
        assert 0 < prompts.mean_set_size <= 32
    prompts.close()


@uses("Decoder.measure_steps")
def measure_steps(bench: Bench) -> None:
    seconds = bench.open().measure_steps(256, 2, steps=3, warmup=1)
    assert len(seconds) == 3 and min(seconds) > 0


@uses("PlanConfig", "PlanConfig.settings")
def plan_config(bench: Bench) -> None:
    plan = tidaldecode.PlanConfig(**PLAN)
    decoder = bench.open(select_layers=plan.select_layers, **plan.settings())
    assert decoder.config.token_budget == 32 and decoder.plan == "FFSssssS"


@uses("PlanConfig.choosing_layers", "scored_layers", "shadow='int4'")
def scored_layers(bench: Bench) -> None:
    plan = tidaldecode.PlanConfig(scored_layers=(2, 4, 7), token_budget=32, sparse_min_context=0)
    assert plan.choosing_layers == (2, 4, 7)
    for extra in ({}, {"verify": True}, {"token_budget": "auto"}, {"shadow": "int4"}):
        decoder = bench.open(scored_layers=plan.scored_layers, **plan.settings() | extra)
        result = decoder.generate(IDS * 4, max_new_tokens=12, ignore_eos=True)
        assert len(result.token_ids) == 12 and sorted(decoder.selection()) == [2, 4, 7]


@uses("hub ids", "revision")
def hub_ids(bench: Bench) -> None:
    bench.cache_model("org/name")
    for name, revision in (("org/name", None), ("org/name", "main"), ("org/name@main", None)):
        with tidaldecode.Decoder(
            name, revision=revision, device=bench.device, dtype=bench.dtype, max_seq_len=64
        ) as decoder:
            assert len(decoder.generate(IDS, max_new_tokens=2, ignore_eos=True).token_ids) == 2


@uses(
    "Decoder", "Decoder.plan", "Decoder.plan_source", "Decoder.model", "Decoder.folder",
    "Decoder.config", "Decoder.num_free_pages", "Decoder.close", "DecodeConfig",
    "demo_model_dir", "__version__",
)  # fmt: skip
def look_inside(bench: Bench) -> None:
    settings = tidaldecode.DecodeConfig(device=bench.device, dtype=bench.dtype, max_seq_len=256)
    with tidaldecode.Decoder(tidaldecode.demo_model_dir(), config=settings) as decoder:
        assert "S" in decoder.plan and decoder.plan_source != "dense"
        assert decoder.model.num_layers == len(decoder.plan)
        assert decoder.folder.path == tidaldecode.demo_model_dir()
        assert decoder.config.device.startswith(bench.device)
        assert decoder.num_free_pages > 0
    decoder.close()
    with pytest.raises(tidaldecode.InvalidArgument, match="closed"):
        decoder.generate(IDS)
    assert tidaldecode.__version__


@uses(
    "Decoder.memory_plan", "plan_memory", "MemoryPlan", "MemoryPlan.rows", "MemoryPlan.title",
    "MemoryPlan.num_tokens", "MemoryPlan.scratch_bytes", "MemoryPlan.total_bytes",
)  # fmt: skip
def memory(bench: Bench) -> None:
    settings = {"device": bench.device, "dtype": bench.dtype, "num_pages": 64, "num_threads": 1}
    plan = tidaldecode.plan_memory(bench.model, max_seq_len=512, max_batch_size=4, **settings)
    assert isinstance(plan, tidaldecode.MemoryPlan) and not plan.problem
    assert plan.num_tokens == plan.num_pages * plan.page_size
    assert plan.total_bytes > plan.scratch_bytes + plan.kv_bytes
    held = bench.open(num_pages=64).memory_plan()
    assert (held.total_bytes, held.title(), len(held.rows())) == (
        plan.total_bytes, plan.title(), len(plan.rows())
    )  # fmt: skip


@uses("Verification", "Verification.acceptance_rate", "Verification.tokens_per_dense_pass")
def verified_decoding(bench: Bench) -> None:
    decoder = bench.open(verify=True, **PLAN)
    checks = decoder.generate(IDS * 4, max_new_tokens=24, ignore_eos=True).verification
    assert isinstance(checks, tidaldecode.Verification)
    assert 0 <= checks.acceptance_rate <= 1 and checks.tokens_per_dense_pass >= 1


@uses("verify='greedy'", "draft_tokens", "correction_interval", "token_budget='auto'")
def settings_of_a_decoder(bench: Bench) -> None:
    for options in (
        {"verify": "greedy", "draft_tokens": 4},
        {"correction_interval": 8},
        {"token_budget": "auto", "top_p_mass": 0.9, "min_token_budget": 16},
        {"granularity": "kv_head", "pooling": "max", "sink_tokens": 4, "recent_tokens": 8},
        {"granularity": "head", "page_size": 16, "prefill_chunk": 16},
    ):
        decoder = bench.open(**PLAN | options)
        result = decoder.generate(IDS * 4, max_new_tokens=16, ignore_eos=True)
        assert len(result.token_ids) == 16, options


@uses("load_format='dummy'", "gpu_memory_utilization")
def dummy_weights(bench: Bench) -> None:
    decoder = bench.open(load_format="dummy", gpu_memory_utilization=0.5)
    assert len(decoder.measure_steps(64, steps=2)) == 2


@uses("should_stop")
def should_stop(bench: Bench) -> None:
    decoder = bench.open()
    left = iter([False] * 3)
    result = decoder.generate(IDS, max_new_tokens=50, should_stop=lambda: next(left, True))
    assert result.finish_reason == "abort" and len(result.token_ids) < 50


# Session


@uses(
    "Session", "Session.append", "Session.generate", "Session.stream", "Session.token_ids",
    "Session.max_seq_len", "Session.truncate", "Session.fork", "Session.close",
)  # fmt: skip
def session(bench: Bench) -> None:
    decoder = bench.open()
    free = decoder.num_free_pages
    with decoder.session() as talk:
        assert talk.append(IDS * 2)
        branch = talk.fork()
        first = talk.generate(PROMPT, max_new_tokens=6, ignore_eos=True)
        assert first.cached_tokens >= len(IDS) and len(first.token_ids) == 6
        second = branch.stream(PROMPT, max_new_tokens=6, ignore_eos=True)
        assert "".join(second) == first.text
        assert talk.token_ids == branch.token_ids
        talk.truncate(len(IDS))
        assert talk.token_ids == IDS and talk.max_seq_len == 512
        branch.close()
    assert decoder.num_free_pages == free


@uses("Session.chat", "Session.chat_stream")
def session_chat(bench: Bench) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    with bench.open().session() as talk:
        answer = talk.chat(messages, max_new_tokens=4)
        messages += [
            {"role": "assistant", "content": answer.text},
            {"role": "user", "content": " and"},
        ]
        again = talk.chat_stream(messages, max_new_tokens=4)
        assert "".join(again) == again.result.text


# The command line


FORMATS = ["--weight-format", "fp8", "--lm-head-format", "int4", "--activation-format", "auto"]
ENGINE = [
    "--attention", "tidal", "--select-layers", "2", "--scored-layers", "7", "--token-budget", "32",
    "--max-seq-len", "512", "--page-size", "16", "--gpu-memory-utilization", "0.5",
    "--prefill-chunk", "64", *FORMATS,
]  # fmt: skip
PLAN_OPTIONS = [
    "--full-layers", "2", "--top-p-mass", "0.98", "--min-token-budget", "16", "--granularity",
    "layer", "--pooling", "sum", "--sink-tokens", "1", "--recent-tokens", "8",
    "--sparse-min-context", "0", "--shadow", "none",
]  # fmt: skip
SAMPLING = [
    "--max-new-tokens", "8", "--temperature", "0.8", "--top-k", "40", "--top-p", "0.9", "--min-p",
    "0.01", "--repetition-penalty", "1.1", "--seed", "3", "--stop", "\n\n\n", "--stop-token-id",
    "0", "--ignore-eos",
]  # fmt: skip
DRAFTING = ["--verify", "--drafts", "both", "--draft-tokens", "4"]


@uses("tidaldecode generate")
def generate_command(bench: Bench) -> None:
    model = str(bench.model)
    plain = bench.command("generate", model, PROMPT, "--max-new-tokens", "6")
    assert plain.strip()
    drawn = bench.command(
        "generate", model, PROMPT, *ENGINE, *PLAN_OPTIONS, *SAMPLING,
        "--correction-interval", "8", "--kv-dtype", bench.dtype, "--num-threads", "1",
    )  # fmt: skip
    assert drawn.strip()
    path = bench.folder / "prompt.txt"
    path.write_text(PROMPT)
    asked = bench.command(
        "generate", model, "--prompt-file", str(path), *ENGINE, *DRAFTING, "--max-new-tokens", "6",
    )  # fmt: skip
    assert asked.strip()
    bench.command("generate", model, "Who is there?", "--chat", "--system", "Be brief.", "-n", "4")
    bench.cache_model("org/name")
    bench.command("generate", "org/name", PROMPT, "-n", "2", "--revision", "main")


@uses("tidaldecode chat")
def chat_command(bench: Bench) -> None:
    bench.type("Hello\n/reset\nAnd now?\n/save " + str(bench.folder / "talk.json") + "\n/exit\n")
    bench.command(
        "chat", str(bench.model), "--system", "Be brief.", *ENGINE, *PLAN_OPTIONS, *SAMPLING,
        "--correction-interval", "8", "--kv-dtype", bench.dtype, "--num-threads", "1",
    )  # fmt: skip
    roles = [m["role"] for m in json.loads((bench.folder / "talk.json").read_text())]
    assert roles == ["system", "user", "assistant"]
    bench.type("Hello\n")
    bench.cache_model("org/name")
    bench.command("chat", "org/name", *ENGINE, *DRAFTING, "-n", "4", "--revision", "main")


@uses("tidaldecode info")
def info_command(bench: Bench) -> None:
    assert bench.device in bench.command("info", on_device=False)
    text = bench.command(
        "info", str(bench.model), *ENGINE, *DRAFTING, "--max-batch-size", "2",
        "--num-pages", "128", "--kv-dtype", bench.dtype, "--shadow", "none",
    )  # fmt: skip
    assert "KV cache" in text and "128 pages" in text
    bench.cache_model("org/name")
    assert "name (llama)" in bench.command("info", "org/name", "--revision", "main")


@uses("tidaldecode demo")
def demo_command(bench: Bench) -> None:
    text = bench.command(
        "demo", "--model", str(bench.model), "--context", "600", "--select-layers", "2",
        "--scored-layers", "4,7", "--token-budget", "64", "--top-p-mass", "0.98",
        "--min-token-budget", "16", "--seed", "5", "--num-threads", "1",
    )  # fmt: skip
    assert "tidal" in text


@uses("tidaldecode calibrate")
def calibrate_command(bench: Bench) -> None:
    plan = bench.folder / "plan.json"
    bench.command(
        "calibrate", str(bench.model), "--builtin", "--context", "512", "--token-budget", "64",
        "--max-choosing-layers", "2", "--max-loss", "9", "--seed", "1", "--output", str(plan),
        "--kv-dtype", bench.dtype, "--num-threads", "1", "--chat", *FORMATS,
    )  # fmt: skip
    assert {"select_layers", "scored_layers"} & json.loads(plan.read_text()).keys()
    bench.command(
        "calibrate", str(bench.model), "--text", str(text_file(bench)), "--context", "256",
        "--token-budget", "32", "--max-choosing-layers", "1", "--max-loss", "0", "--keep-anyway",
        "--no-chat", "--output", str(bench.folder / "other.json"), "--num-threads", "1",
    )  # fmt: skip


@uses("tidaldecode eval")
def eval_command(bench: Bench) -> None:
    out = bench.folder / "eval"
    shown = bench.command(
        "eval", str(bench.model), "--context", "600", "--task", "single", "--limit", "2", "--tidal",
        "select_layers=2,7 token_budget=64", "--tidal", "scored_layers=2,5 token_budget=64",
        "--quest", "token_budget=64 page_size=16", "--compare", "presets", "--token-budget", "32",
        "--interval", "0.7", "--attention", "--out", str(out), "--seed", "2", "--kv-dtype",
        bench.dtype, "--num-threads", "1", *FORMATS,
    )  # fmt: skip
    assert "single" in shown and "all-P K=32" in shown and "Asked 2 prompts" in shown
    check_report(out)
    bench.command(
        "eval", str(bench.model), "--text", str(text_file(bench)), "--context", "400", "--limit",
        "1", "--scored-tokens", "16", "--no-chat", "--out", str(bench.folder / "text"),
    )  # fmt: skip
    check_report(bench.folder / "text")
    own = bench.folder / "own.jsonl"
    own.write_text(json.dumps({"prompt": "The key is 7. The key is", "answers": ["7"]}) + "\n")
    plots = ["--plots"] if importlib.util.find_spec("matplotlib") else []
    bench.command(
        "eval", str(bench.model), "--prompts", str(own), "--chat", "--max-new-tokens", "4",
        "--out", str(bench.folder / "own"), *plots,
    )  # fmt: skip
    check_report(bench.folder / "own")


def check_report(folder: Path) -> None:
    """A report is strict JSON and says something."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{folder}: {name} in a report")

    assert json.loads((folder / "report.json").read_text(), parse_constant=refuse)


def text_file(bench: Bench) -> Path:
    """A file of prose."""
    (path := bench.folder / "text.txt").write_text("\n\n".join(manual_text(3000, seed=1)))
    return path
