"""tidaldecode serve: the command."""

from __future__ import annotations

import importlib
import os
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from tidaldecode import _core
from tidaldecode.checkpoint.model_folder import at_revision, read_model_folder
from tidaldecode.cli import options as opt
from tidaldecode.cli.terminal import Bars, is_watched, one_line, say
from tidaldecode.config import OPTION_HELP, one_config
from tidaldecode.decoder import Decoder
from tidaldecode.errors import ConfigError, show
from tidaldecode.server.settings import ServeConfig

_PANEL = "Server"
_DEFAULTS = ServeConfig()
_LISTS = {"api_key": "api_keys", "served_model_name": "served_model_names"}
_LISTS |= {"cors_origin": "cors_origins"}

# The server's own options: type and help of each.
_SERVER: dict[str, tuple[Any, str]] = {
    "host": (str, "Address to listen at."),
    "port": (int, "0 is any that is free."),
    "uds": (str, "A Unix socket instead of host and port."),
    "api_key": (list[str], "Requests need one of these; may be repeated."),
    "api_key_file": (Path, "A file with a key a line."),
    "served_model_name": (list[str], "What clients call the model; default: its folder's name."),
    "prefix_cache_scope": (str, "key: requests with other keys share no pages; or shared."),
    "max_queued_requests": (int, "More are refused (503)."),
    "max_queued_tokens": (int, "Prompt tokens that may wait; more are refused (503)."),
    "max_body_mb": (int, "MiB of a request."),
    "max_n": (int, "Answers to a prompt."),
    "max_stop": (int, "Stop strings."),
    "max_logprobs": (int, "Alternatives of a token."),
    "max_tools": (int, "Tools of a chat."),
    "tool_call_parser": (str, "How the model writes calls of tools; none: it has no tools."),
    "reasoning_parser": (str, "none: reasoning is not told from content."),
    "default_max_tokens": (int, "Of a chat that does not say; default: to the context's end."),
    "queue_timeout_s": (float, "Longest wait for a row; 0 is for ever."),
    "request_timeout_s": (float, "Longest answer; 0 is for ever."),
    "shutdown_timeout_s": (float, "For answers under way, at the end."),
    "sse_keep_alive_s": (float, "A stream that is silent so long gets a comment."),
    "stream_interval": (int, "Tokens per event of a stream."),
    "step_timeout_s": (float, "An engine that does nothing for so long is dead."),
    "slow_client_timeout_s": (float, "A client that reads nothing for so long is dropped."),
    "header_timeout_s": (float, "For the head of a request."),
    "cors_origin": (list[str], "Web origins that may use the server; may be repeated."),
    "ssl_certfile": (str, "For TLS."),
    "ssl_keyfile": (str, "Its private key."),
    "metrics_alias": (str, "vllm: metrics under vLLM's names as well."),
    "ray": (int, "Replicas of the server on a Ray cluster of this machine, a GPU for each."),
}


def _server_option(name: str) -> Parameter:
    kind, words = _SERVER[name]
    default = getattr(_DEFAULTS, name, None)
    if default not in (None, ()):
        words += opt.default_words(default)
    return opt.make_option(name, kind, words, _PANEL)


_Web = Annotated[bool, typer.Option("--web/--no-web", help="The page.", rich_help_panel=_PANEL)]


@opt.with_options(
    server=[_server_option(name) for name in _SERVER],
    engine=opt.engine_options(*OPTION_HELP),
)
def serve(
    model_dir: opt.ModelDir,
    *,
    server: dict[str, Any],
    web: _Web = True,
    revision: opt.Revision = None,
    engine: dict[str, Any],
    debug: opt.Debug = False,
) -> None:
    """Serve a model to clients of OpenAI's API, over HTTP."""
    settings = _settings(server, web)
    engine = {"max_batch_size": 64} | engine
    _check_installed(settings)
    start = _single if settings.ray is None else _replicated
    run = start(model_dir, revision, engine, settings)
    code = run.run()
    problem = run.service.problem
    if problem is not None and run.service.loaded is None:
        raise problem
    raise typer.Exit(code)


def _single(
    model_dir: Path, revision: str | None, engine: dict[str, Any], settings: ServeConfig
) -> Any:
    """A server in this process."""
    from tidaldecode.server.run import Run

    bars = Bars(is_watched())

    def load(progress: Any) -> Decoder:
        model = at_revision(model_dir, revision)
        with bars.loading(f"Loading {model_dir.name}") as on_load:

            def on_progress(done: int, total: int) -> None:
                progress(done, total)
                on_load(done, total)

            return Decoder(model, **engine, progress=on_progress)

    run = Run(load, settings)
    run.on_ready = lambda: say(start_line(run))
    return run


def _replicated(
    model_dir: Path, revision: str | None, engine: dict[str, Any], settings: ServeConfig
) -> Any:
    """A server in front of replicas."""
    from tidaldecode.server.ray_front import RayFront
    from tidaldecode.server.ray_replicas import RayReplicas, ReplicaSpec
    from tidaldecode.server.run import ServerProcess

    count = settings.ray or 1
    engine, num_gpus = placed(engine, count)
    # What is wrong with these is said before Ray starts.
    config = one_config(None, engine)
    model = at_revision(model_dir, revision)
    spec = ReplicaSpec(
        model_dir=read_model_folder(model, config.load_format).path,
        engine=engine,
        settings=settings,
    )
    front = RayFront(RayReplicas(spec, count, num_gpus), settings, engine["max_batch_size"])
    run = ServerProcess(front, front.app, settings)
    run.on_ready = lambda: say(
        one_line(f"Serving {front.loaded}, replicas: {count}, at {run.address}")
    )
    return run


def placed(options: dict[str, Any], count: int) -> tuple[dict[str, Any], int]:
    """A replica's options, and the GPUs that all replicas share: one each, or none on the CPU.

    Raises: ConfigError for a GPU by its number, and for more replicas than GPUs.
    """
    device = options.get("device", "auto")
    if device.startswith("cuda:"):
        raise ConfigError(
            f"device: got {show(device)} with ray, expected 'auto', 'cpu' or 'cuda': each replica "
            "has a GPU of its own"
        )
    devices = [each["name"] for each in _core.list_devices() if each["available"]]
    num_gpus = sum(name.startswith("cuda") for name in devices)
    if device == "cpu" or (device == "auto" and not num_gpus):
        cores = len(os.sched_getaffinity(0))
        return {"num_threads": max(1, cores // count)} | options, 0
    if count > num_gpus:
        raise ConfigError(f"ray: got {count} replicas, expected at most {num_gpus}: a GPU each")
    return options, num_gpus


def _check_installed(settings: ServeConfig) -> None:
    """Raises: ConfigError naming what the server needs and is not installed."""
    names = ["fastapi", "orjson", "prometheus_client", "uvicorn", "uvloop"]
    names += ["tidaldecode.server.ray_replicas", "aiohttp"] if settings.ray is not None else []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as missing:
            extra = "serve" if name in names[:5] else "ray"
            raise ConfigError(
                f"serve: needs {missing.name}, which is not installed; "
                f"pip install 'tidaldecode[{extra}]'"
            ) from missing


def _settings(server: dict[str, Any], web: bool) -> ServeConfig:
    """The server's settings out of the command's options."""
    given = {_LISTS.get(name, name): value for name, value in server.items()}
    key_file = given.pop("api_key_file", None)
    given |= {field: tuple(given[field]) for field in _LISTS.values() if field in given}
    if key_file is not None:
        given["api_keys"] = (*given.get("api_keys", ()), *_read_keys(key_file))
    return ServeConfig(**given, web=web)


def _read_keys(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"api-key-file: {path}: cannot be read") from cause
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise ConfigError(f"api-key-file: {path}: has no key, expected one a line")
    return keys


def start_line(run: Any) -> str:
    """What is served, how, and where."""
    return one_line(f"Serving {run.service.in_words()}, at {run.address}")
