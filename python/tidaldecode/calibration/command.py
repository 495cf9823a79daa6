"""The command `tidaldecode calibrate`: finds a plan for a model by measuring.

Registered by cli/app.py. Exit code 3: no plan is good enough, and none was kept.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tidaldecode.calibration.data import builtin_text
from tidaldecode.calibration.plan_store import check_output, plan_content, store_plan
from tidaldecode.calibration.run import Job, Outcome, calibrate_model
from tidaldecode.calibration.search import frontier, open_layers
from tidaldecode.calibration.view import show_frontier, show_judgement
from tidaldecode.checkpoint.fingerprint import model_fingerprint
from tidaldecode.checkpoint.model_folder import ModelFolder, read_model_folder
from tidaldecode.cli import options as opt
from tidaldecode.cli.terminal import Bars, is_watched, one_line, print_note
from tidaldecode.config import DecodeConfig
from tidaldecode.engine_config import resolve_device
from tidaldecode.errors import InvalidArgument
from tidaldecode.evaluation.example import make_encoder
from tidaldecode.evaluation.perplexity import read_text
from tidaldecode.plan_bytes import log_gain
from tidaldecode.plans import PLAN_FILE
from tidaldecode.sampling import check_integer
from tidaldecode.text.tokenizer import Tokenizer

EXIT_NOT_GOOD_ENOUGH = 3
# The longer of the two default contexts; a CPU reads slowly.
_LONG_CONTEXTS = {"cpu": 4096, "cuda": 16384}
_SHORT_SHARE = 4
_DEFAULT_BUDGETS = (64, 256, 512, 1024)
_LEAST_BUDGET = 8
_DEFAULT_LOSS = 0.005  # nats a token: about half a percent of perplexity

_Text = Annotated[
    Path | None,
    typer.Option(
        help="A text file like what the model is used for; UTF-8."
        + opt.default_words("the text that comes with Python")
    ),
]
_Builtin = Annotated[
    bool,
    typer.Option("--builtin", help="Use the text that comes with Python, its language reference."),
]
_Contexts = Annotated[
    list[int] | None,
    typer.Option(
        help="Tokens of a prompt; may be repeated: give what the model is asked to serve, since "
        "short ones flatter." + opt.default_words("a short and a long one, by model and device")
    ),
]
_Budgets = Annotated[
    list[int] | None,
    typer.Option(
        help="Positions a sparse layer attends to; may be repeated, the cheapest that is good "
        "enough is taken." + opt.default_words(", ".join(map(str, _DEFAULT_BUDGETS)))
    ),
]
_MaxLoss = Annotated[
    float,
    typer.Option(help="Nats a token over dense, of text and answers, and one for answers lost."),
]
_Output = Annotated[
    Path | None,
    typer.Option(
        help="Where the plan goes." + opt.default_words("beside the model, else the user's cache")
    ),
]
_KeepAnyway = Annotated[
    bool,
    typer.Option("--keep-anyway", help="Keep the best plan even if it loses more than --max-loss."),
]


@opt.with_options(engine=opt.engine_options(*opt.PLACE, "num_threads"))
def calibrate(
    model_dir: opt.ModelDir,
    *,
    text: _Text = None,
    builtin: _Builtin = False,
    context: _Contexts = None,
    chat: opt.Chat = None,
    max_choosing_layers: Annotated[
        int | None,
        typer.Option(help="Most layers that choose positions." + opt.default_words("any number")),
    ] = None,
    token_budget: _Budgets = None,
    max_loss: _MaxLoss = _DEFAULT_LOSS,
    output: _Output = None,
    keep_anyway: _KeepAnyway = False,
    seed: Annotated[int, typer.Option(help="Of the questions.")] = 0,
    engine: dict[str, Any],
    debug: opt.Debug = False,
) -> None:
    """Find the plan that loses least for the bytes it reads, and keep it for the model."""
    _check(text, builtin, max_loss)
    DecodeConfig(**engine)  # refuses what no engine takes before anybody waits
    folder = read_model_folder(model_dir)
    open_layers(folder.model)  # refuses before anybody waits
    log_gain(folder)
    contexts = _contexts(context, folder, engine["device"])
    if max_choosing_layers is not None:
        check_integer("max_choosing_layers", max_choosing_layers, low=1)
    if output is not None:
        check_output(output)
    ask, is_chat = make_encoder(folder, chat)
    job = Job(
        folder=folder,
        text=builtin_text() if text is None else read_text(text),
        encode=Tokenizer(folder.path, folder.model.vocab_size).encode,
        ask=ask,
        is_chat=is_chat,
        contexts=contexts,
        budgets=_budgets(token_budget, max(contexts)),
        max_choosing_layers=max_choosing_layers,
        max_loss=max_loss,
        seed=seed,
        engine=engine,
    )
    try:
        outcome = calibrate_model(job, Bars(is_watched()))
    except KeyboardInterrupt:
        print_note("the same command goes on from here")
        raise
    console = Console(highlight=False, markup=False)
    is_good = outcome.chosen.scores.loss <= max_loss
    try:
        console.print(f"Model: {one_line(str(model_dir))}", soft_wrap=True)
        show_frontier(console, outcome, folder.model.windows)
        show_judgement(console, job, outcome)
    finally:  # also where stdout takes nothing
        if is_good or keep_anyway:
            _keep(console, job, outcome, text, output)
    if not is_good and not keep_anyway:
        print_note(_not_good_enough(job, outcome))
        raise typer.Exit(EXIT_NOT_GOOD_ENOUGH)


def _check(text: Path | None, builtin: bool, max_loss: float) -> None:
    if text is not None and builtin:
        raise InvalidArgument("text: got both, expected --text FILE or --builtin")
    if not math.isfinite(max_loss):
        raise InvalidArgument(f"max-loss: got {max_loss}, expected a number of nats")


def _not_good_enough(job: Job, outcome: Outcome) -> str:
    least = min(point.scores.loss for point in frontier(outcome.points))
    return (
        f"no plan loses as little as {job.max_loss:g} (the best {least:.3g}), so none was kept: "
        "the model is decoded densely; allow a larger --token-budget or a larger --max-loss, or "
        "keep the best one with --keep-anyway"
    )


def _keep(
    console: Console, job: Job, outcome: Outcome, text: Path | None, output: Path | None
) -> None:
    """Stores the plan; where it cannot be written, it is printed.

    Raises: InvalidArgument for an output that cannot be written.
    """
    description = "Python's language reference" if text is None else text.name
    content = plan_content(job, outcome, description, model_fingerprint(job.folder))
    try:
        place = store_plan(content, job.folder.path, output)
    except InvalidArgument:
        print_note(f"the plan could not be written; it is printed, to be saved as {PLAN_FILE}")
        console.print(json.dumps(content, indent=2), soft_wrap=True)
        raise
    console.print(f"Plan: {one_line(str(place))}", soft_wrap=True)


def _contexts(asked: list[int] | None, folder: ModelFolder, device: str) -> tuple[int, ...]:
    """Ascending; by default a short and a long one that the model has positions for.

    Raises: InvalidArgument for one that is longer than the model.
    """
    most = folder.model.max_position_embeddings
    if asked:
        return tuple(sorted({check_integer("context", n, low=1, high=most) for n in asked}))
    longest = min(_LONG_CONTEXTS[resolve_device(device).partition(":")[0]], most)
    return tuple(sorted({max(1, longest // _SHORT_SHARE), longest}))


def _budgets(asked: list[int] | None, context: int) -> tuple[int, ...]:
    """Ascending. More than half of a prompt would hardly be sparse: such defaults are left out.

    Raises: InvalidArgument for one that was asked for.
    """
    most = max(_LEAST_BUDGET, context // 2)
    budgets = asked or [budget for budget in _DEFAULT_BUDGETS if budget <= most] or [most]
    checked = {
        check_integer("token_budget", value, low=_LEAST_BUDGET, high=most) for value in budgets
    }
    return tuple(sorted(checked))
