"""tidaldecode serve: the command."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from inspect import Parameter
from pathlib import Path
from typing import Any, get_type_hints

import typer

from tidaldecode import _core
from tidaldecode.checkpoint.model_folder import at_revision, read_model_folder
from tidaldecode.cli import options as opt
from tidaldecode.cli.terminal import Bars, is_watched, one_line, say
from tidaldecode.config import OPTION_HELP, one_config
from tidaldecode.decoder import Decoder
from tidaldecode.errors import ConfigError, show
from tidaldecode.server.settings import SERVE_OPTION_HELP, ServeConfig

_PANEL = "Server"


def _server_options() -> Iterator[Parameter]:
    hints = get_type_hints(ServeConfig)
    for name, words in SERVE_OPTION_HELP.items():
        default = getattr(ServeConfig, name)
        if default not in (None, ()):
            words += opt.default_words(default)
        yield opt.make_option(name, opt.kind_of(hints[name]), words, _PANEL)
        if name == "api_keys":
            yield opt.make_option("api_key_file", Path, "A file with a key a line.", _PANEL)
    yield opt.make_option("web", bool, "The page.", _PANEL, ServeConfig.web)


@opt.with_options(
    server=[*_server_options()], engine=opt.engine_options(*OPTION_HELP, max_batch_size=64)
)
def serve(
    model_dir: opt.ModelDir,
    *,
    server: dict[str, Any],
    revision: opt.Revision = None,
    engine: dict[str, Any],
    debug: opt.Debug = False,
) -> None:
    """Serve a model to clients of OpenAI's or Anthropic's API, over HTTP."""
    settings = _settings(server)
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


def _settings(server: dict[str, Any]) -> ServeConfig:
    """The server's settings out of the command's options."""
    given: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in server.items()
    }
    key_file = given.pop("api_key_file", None)
    if key_file is not None:
        given["api_keys"] = (*given.get("api_keys", ()), *_read_keys(key_file))
    return ServeConfig(**given)


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
