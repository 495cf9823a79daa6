"""The command `tidaldecode calibrate`: finds a plan for a model by measuring.

Registered by cli.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tidaldecode import _core
from tidaldecode.calibration.data import CalibrationData, builtin_text, make_data
from tidaldecode.calibration.objective import Objective, decoder_options
from tidaldecode.calibration.plan_store import plan_content, store_plan
from tidaldecode.calibration.search import (
    Candidate,
    Point,
    Search,
    choose,
    frontier,
    kv_bytes_per_step,
)
from tidaldecode.calibration.view import show_frontier
from tidaldecode.checkpoint.fingerprint import model_fingerprint
from tidaldecode.checkpoint.model_folder import ModelFolder, read_model_folder
from tidaldecode.cli import options as opt
from tidaldecode.cli.terminal import Bars, is_watched, one_line, print_note
from tidaldecode.decoder import Decoder
from tidaldecode.errors import InvalidArgument
from tidaldecode.evaluation.perplexity import read_text
from tidaldecode.sampling import check_integer
from tidaldecode.text.tokenizer import Tokenizer
from tidaldecode.user_cache import user_cache_dir

_DEFAULT_CONTEXT = 4096
_DEFAULT_BUDGETS = (64, 256, 1024)
_LEAST_BUDGET = 8
_DEFAULT_SELECT_LAYERS = 3
_DEFAULT_LOSS = 0.03  # nats a token: about 3 % of perplexity
_NUM_WINDOWS = 6
_SCORED_TOKENS = 64
_NUM_QUESTIONS = 30
# How many plans a search scores is not known before; a bar wants a number.
_PLANS_GUESSED = 100
_VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_Text = Annotated[
    Path | None, typer.Option(help="A text file like what the model is used for; UTF-8.")
]
_Builtin = Annotated[
    bool,
    typer.Option("--builtin", help="Use the text that comes with Python, its language reference."),
]
_Budgets = Annotated[
    list[int] | None,
    typer.Option(
        help="Positions a sparse layer attends to; may be repeated, the cheapest that is good "
        f"enough is taken. [dim]\\[default: {', '.join(map(str, _DEFAULT_BUDGETS))}][/dim]"
    ),
]
_MaxLoss = Annotated[
    float,
    typer.Option(help="Nats a token over dense, of text and answers, and one for answers lost."),
]
_Output = Annotated[
    Path | None,
    typer.Option(
        help="Where the plan goes. [dim]\\[default: beside the model, else the user's cache][/dim]"
    ),
]


def calibrate(
    model_dir: opt.ModelDir,
    text: _Text = None,
    builtin: _Builtin = False,
    context: Annotated[int, typer.Option(help="Tokens of a prompt.")] = _DEFAULT_CONTEXT,
    max_select_layers: Annotated[
        int, typer.Option(help="Most layers that choose positions.")
    ] = _DEFAULT_SELECT_LAYERS,
    token_budget: _Budgets = None,
    max_loss: _MaxLoss = _DEFAULT_LOSS,
    output: _Output = None,
    seed: Annotated[int, typer.Option(help="Of the questions.")] = 0,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    kv_dtype: opt.KvDType = "auto",
    num_threads: opt.NumThreads = None,
    debug: opt.Debug = False,
) -> None:
    """Find the plan that loses least for the bytes it reads, and keep it for the model."""
    budgets = _budgets(token_budget, context)
    check_integer("max_select_layers", max_select_layers, low=1)
    engine = opt.engine_options(
        {"device": device, "dtype": dtype, "kv_dtype": kv_dtype, "num_threads": num_threads}
    )
    folder = read_model_folder(model_dir)
    data = _data(folder, text, builtin, context, seed)
    bars = Bars(is_watched())
    points, value_bytes = _search(folder, data, engine, budgets, max_select_layers, bars)
    chosen = choose(points, max_loss)
    fingerprint = model_fingerprint(folder)
    place = store_plan(plan_content(chosen, data, fingerprint), folder.path, output)
    dense = Candidate(select_layers=(), token_budget=1)
    dense_bytes = kv_bytes_per_step(folder.model, dense, data.context, value_bytes)
    console = Console(highlight=False)
    console.print(f"Model: {one_line(str(model_dir))}", soft_wrap=True, markup=False)
    show_frontier(console, frontier(points), chosen, folder.model.num_layers, dense_bytes)
    if chosen.scores.loss > max_loss:
        print_note(
            f"no plan loses as little as {max_loss:g}; the best of them was taken; allow a larger "
            "--token-budget or more --max-select-layers"
        )
    console.print(f"Plan: {one_line(str(place))}", soft_wrap=True, markup=False)


def _budgets(asked: list[int] | None, context: int) -> list[int]:
    """Ascending. More than half of a prompt would hardly be sparse: such defaults are left out.

    Raises: InvalidArgument for one that was asked for.
    """
    most = max(_LEAST_BUDGET, check_integer("context", context, low=1) // 2)
    budgets = asked or [budget for budget in _DEFAULT_BUDGETS if budget <= most] or [most]
    return sorted(
        {check_integer("token_budget", value, low=_LEAST_BUDGET, high=most) for value in budgets}
    )


def _data(
    folder: ModelFolder, text: Path | None, builtin: bool, context: int, seed: int
) -> CalibrationData:
    if (text is None) != builtin:
        found = "neither" if text is None else "both"
        raise InvalidArgument(f"text: got {found}, expected --text FILE or --builtin")
    tokenizer = Tokenizer(folder.path, folder.model.vocab_size)
    return make_data(
        builtin_text() if text is None else read_text(text),
        tokenizer.encode,
        description="Python's language reference" if text is None else text.name,
        context=context,
        num_windows=_NUM_WINDOWS,
        scored_tokens=_SCORED_TOKENS,
        num_questions=_NUM_QUESTIONS,
        seed=seed,
    )


def _search(
    folder: ModelFolder,
    data: CalibrationData,
    engine: dict[str, Any],
    budgets: list[int],
    max_select_layers: int,
    bars: Bars,
) -> tuple[list[Point], int]:
    """All plans scored, and the bytes of a number in the cache."""
    options = decoder_options(data, _core.DecodeConfig().page_size)
    with (
        bars.loading(f"Loading {folder.path.name}") as on_load,
        Decoder(folder.path, **options, **engine, progress=on_load) as decoder,
        bars.counting("Plans") as on_scored,
    ):
        objective = Objective(decoder, data, _score_file(decoder, data))
        value_bytes = _VALUE_BYTES[decoder.config.kv_dtype]
        search = Search(
            folder.model,
            lambda candidate: objective.scores(**candidate.options()),
            seq_len=data.context,
            value_bytes=value_bytes,
            bound=lambda candidate: objective.answers(**candidate.options()).loss,
            on_scored=lambda count: on_scored(count, max(_PLANS_GUESSED, count + 1)),
        )
        try:
            return search.run(budgets, max_select_layers), value_bytes
        except KeyboardInterrupt:
            print_note("the same command goes on from here")
            raise


def _score_file(decoder: Decoder, data: CalibrationData) -> Path | None:
    """Where scores of this model, engine and data are kept; None if nowhere."""
    config = decoder.config
    name = [_core.version(), config.device.partition(":")[0], config.dtype, config.kv_dtype]
    fingerprint = model_fingerprint(decoder.folder)
    path = user_cache_dir() / "scores" / f"{fingerprint}-{data.digest}-{'-'.join(name)}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return path
