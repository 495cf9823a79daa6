"""The command `tidaldecode eval`: dense against tidal settings on the same prompts.

Registered by cli.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tidaldecode import cli_options as opt
from tidaldecode.errors import InvalidArgument
from tidaldecode.evaluation.example import Encode, Example
from tidaldecode.evaluation.prompt_file import read_prompt_file
from tidaldecode.evaluation.report import Summary, as_json, summarise
from tidaldecode.evaluation.results import ResultFile
from tidaldecode.evaluation.runner import Run, run
from tidaldecode.evaluation.settings import Setting, check_names, dense_setting, tidal_setting
from tidaldecode.evaluation.tasks import TASKS, make_examples
from tidaldecode.evaluation.view import show_report
from tidaldecode.model_folder import read_model_folder
from tidaldecode.plans import HOW_TO_CHOOSE, find_plan
from tidaldecode.sampling import check_integer
from tidaldecode.terminal import Bars, is_watched, one_line, print_note
from tidaldecode.tokenizer import Tokenizer

_DEFAULT_CONTEXT = 4096
_DEFAULT_PROMPTS = 10  # per task and context: every depth of the single needle once
_OWN_NEW_TOKENS = 64
_RESULTS_FILE = "results.jsonl"
_REPORT_FILE = "report.json"


_Tasks = Annotated[
    list[str] | None,
    typer.Option(help=f"Of {', '.join(TASKS)}; may be repeated, all if not given."),
]
_Prompts = Annotated[
    Path | None,
    typer.Option(help="Own prompts instead: lines of JSON with `prompt` and `answers`."),
]
_Contexts = Annotated[
    list[int] | None,
    typer.Option(
        help="Tokens of prompt and output together; may be repeated. "
        f"[dim]\\[default: {_DEFAULT_CONTEXT}][/dim]"
    ),
]
_Limit = Annotated[
    int | None,
    typer.Option(
        help="Prompts per task and context. "
        f"[dim]\\[default: {_DEFAULT_PROMPTS}, of own prompts all][/dim]"
    ),
]
_Tidal = Annotated[
    list[str] | None,
    typer.Option(
        help='A setting to compare, as "select_layers=2,9 token_budget=64"; may be repeated; '
        "the model's plan if not given."
    ),
]
_NewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        "-n",
        help=f"Of own prompts. [dim]\\[default: {_OWN_NEW_TOKENS}][/dim]",
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for results and report; with the same one a run that was cut off goes on. "
        "[dim]\\[default: eval-MODEL][/dim]"
    ),
]
_Chat = Annotated[
    bool, typer.Option("--chat", help="Put prompts through the model's chat template.")
]


def evaluate(
    model_dir: opt.ModelDir,
    task: _Tasks = None,
    prompts: _Prompts = None,
    context: _Contexts = None,
    limit: _Limit = None,
    tidal: _Tidal = None,
    seed: Annotated[int, typer.Option(help="Of the generated prompts.")] = 0,
    max_new_tokens: _NewTokens = None,
    out: _Out = None,
    chat: _Chat = False,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    kv_dtype: opt.KvDType = "auto",
    num_threads: opt.NumThreads = None,
    debug: opt.Debug = False,
) -> None:
    """Compare dense and tidal decoding on long prompts whose answers are known."""
    engine = opt.engine_options(
        {"device": device, "dtype": dtype, "kv_dtype": kv_dtype, "num_threads": num_threads}
    )
    settings = _settings(model_dir, tidal)
    if prompts is not None and (task or context):
        raise InvalidArgument("prompts: got a file together with --task or --context, expected one")
    if prompts is None and max_new_tokens is not None:
        raise InvalidArgument("max-new-tokens: got it without --prompts; tasks have their own")
    if limit is not None:
        check_integer("limit", limit, low=1)
    encode = _encoder(model_dir, chat)
    bars = Bars(is_watched())
    if prompts is None:
        contexts, per_task = context or [_DEFAULT_CONTEXT], limit or _DEFAULT_PROMPTS
        examples = _generated(task or list(TASKS), encode, contexts, per_task, seed, bars)
    else:
        new_tokens = _OWN_NEW_TOKENS if max_new_tokens is None else max_new_tokens
        check_integer("max_new_tokens", new_tokens, low=1)
        examples = read_prompt_file(prompts, encode, max_new_tokens=new_tokens, limit=limit)
    title = model_dir.resolve().name
    folder = out or Path(f"eval-{title}")
    summaries = _run(
        Run(model_dir=model_dir, settings=settings, examples=examples, engine=engine), folder, bars
    )
    report = folder / _REPORT_FILE
    report.write_text(
        json.dumps(as_json(title, seed, summaries), indent=2) + "\n", encoding="utf-8"
    )
    console = Console(highlight=False)
    console.print(f"Model: {one_line(str(model_dir))}", soft_wrap=True, markup=False)
    show_report(console, summaries)
    console.print(f"Report: {one_line(str(report))}", soft_wrap=True, markup=False)


def _generated(
    names: Sequence[str],
    encode: Encode,
    contexts: Sequence[int],
    per_task: int,
    seed: int,
    bars: Bars,
) -> list[Example]:
    """The examples of generated tasks."""
    examples: list[Example] = []
    with bars.counting("Writing prompts") as on_written:
        for example in make_examples(names, encode, contexts, per_task=per_task, seed=seed):
            examples.append(example)
            on_written(len(examples), len(names) * len(contexts) * per_task)
    return examples


def _run(work: Run, folder: Path, bars: Bars) -> list[Summary]:
    """Decodes what an earlier run in the same folder has not."""
    with ResultFile(folder / _RESULTS_FILE) as results:
        try:
            return summarise(run(work, results, bars))
        except KeyboardInterrupt:
            print_note("the same command goes on from here")
            raise


def _settings(model_dir: Path, tidal: Sequence[str] | None) -> list[Setting]:
    """Dense first, then what was asked for or the model's plan."""
    if tidal is None and find_plan(read_model_folder(model_dir)) is None:
        print_note(
            "no tidal run: there is no plan for this model; give --tidal 'select_layers=2,N', or "
            + HOW_TO_CHOOSE
        )
        return [dense_setting()]
    settings = [dense_setting(), *(tidal_setting(text) for text in tidal or [""])]
    check_names(settings)
    return settings


def _encoder(model_dir: Path, chat: bool) -> Encode:
    folder = read_model_folder(model_dir)
    tokenizer = Tokenizer(folder.path, folder.model.vocab_size)
    if not chat:
        return tokenizer.encode
    return lambda text: tokenizer.render_chat([{"role": "user", "content": text}])
