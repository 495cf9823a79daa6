"""How a server begins and ends: loading, draining, a dead engine, sockets of every kind."""

from __future__ import annotations

import dataclasses
import json
import signal
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")

import httpx  # noqa: E402

from serving import Command, Served, events_of, serving, stream_in_thread, tls_files, until  # noqa: E402
from tidaldecode import BackendError, ConfigError  # noqa: E402
from tidaldecode.server.run import Run, listen  # noqa: E402
from tidaldecode.server.settings import SERVE_OPTION_HELP, ServeConfig  # noqa: E402
from tiny_models import write_nan_model  # noqa: E402

COMPLETIONS = "/v1/completions"
LONG = {"prompt": [5, 6, 7], "max_tokens": 8000, "ignore_eos": True, "temperature": 0}
COMMAND = ("--port", "0", "--num-threads", "1", "--max-seq-len", "16384", "--max-batch-size", "2")


def test_it_listens_while_the_model_loads(demo_model: Path):
    served = Served(demo_model, {}, {})
    make, may_load = served.make, threading.Event()

    def slowly(progress: Any) -> Any:
        progress(1, 2)
        may_load.wait(20)
        return make(progress)

    served.make = slowly
    served._thread.start()
    until(lambda: getattr(served.run._server, "started", False))
    response = httpx.get(served.url + "/health")
    assert response.status_code == 503 and response.headers["retry-after"]
    assert response.json()["status"] == "loading"
    assert response.json()["progress"] == {"bytes_done": 1, "bytes_total": 2}
    assert httpx.get(served.url + "/live").status_code == 200
    refused = served.post(COMPLETIONS, {"prompt": "a"})
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "loading"
    may_load.set()
    until(lambda: httpx.get(served.url + "/health").status_code == 200)
    served.end()
    assert served.exit_code == 0


def test_told_to_end_it_finishes_what_it_answers(demo_model: Path):
    with Command(str(demo_model), *COMMAND) as command:
        url = command.url()
        body = LONG | {"max_tokens": 2500, "stream": True}
        thread, events = stream_in_thread(url + COMPLETIONS, body)
        command.tell()
        until(lambda: httpx.get(url + "/health").status_code == 503)
        assert httpx.get(url + "/health").json()["status"] == "draining"
        refused = httpx.post(url + COMPLETIONS, json=LONG)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        thread.join(30)
        assert events[-1] == "[DONE]"
        assert command.code() == 0


@pytest.mark.parametrize("is_told_twice", [True, False], ids=["told twice", "too late"])
def test_who_takes_too_long_is_aborted(demo_model: Path, is_told_twice: bool):
    seconds = "60" if is_told_twice else "0.5"
    with Command(str(demo_model), *COMMAND, "--shutdown-timeout-s", seconds) as command:
        thread, events = stream_in_thread(
            command.url() + COMPLETIONS, LONG | {"max_tokens": 15000, "stream": True}
        )
        command.tell()
        if is_told_twice:
            time.sleep(0.2)
            command.tell(signal.SIGINT)
        assert command.code() == 1
        thread.join(10)
        assert json.loads(events[-1])["error"]["code"] == "draining"


def test_an_idle_one_ends_at_once(demo_model: Path):
    with Command(str(demo_model), *COMMAND) as command:
        httpx.get(command.url() + "/live")
        began = time.monotonic()
        command.tell()
        assert command.code() == 0 and time.monotonic() - began < 15


def test_a_dead_engine_is_said_and_ends_the_process(demo_model: Path):
    """The engine of this process is told to fail as a device would make it."""
    program = (
        "import sys\n"
        "from tidaldecode import Decoder, BackendError\n"
        "from tidaldecode.server.answer import Answer\n"
        "from tidaldecode.__main__ import main\n"
        "take = Answer._take\n"
        "def fails(self, tokens, text):\n"
        "    if len(self.token_ids) > 20: raise BackendError('cuda: an illegal access')\n"
        "    take(self, tokens, text)\n"
        "Answer._take = fails\n"
        "sys.exit(main())\n"
    )
    with Command(str(demo_model), *COMMAND, program=program) as command:
        url = command.url()
        thread, events = stream_in_thread(url + COMPLETIONS, LONG | {"stream": True})
        thread.join(20)
        assert json.loads(events[-1])["error"]["code"] == "engine_dead"
        response = httpx.get(url + "/health")
        assert response.status_code == 503 and response.json()["status"] == "dead"
        assert command.code() == 70
        assert any("an illegal access" in line for line in command.lines)


def test_an_engine_that_stands_still_is_dead(demo_model: Path):
    with serving(demo_model, step_timeout_s=0.5) as served:
        deaths: list[BaseException] = []
        served.service.die = deaths.append
        stats = served.decoder.stats()
        stuck = stats | {"num_decoding": 1}
        served.decoder.stats = lambda: stuck  # type: ignore[method-assign]
        until(lambda: deaths)
        assert isinstance(deaths[0], BackendError) and "no pass has ended" in str(deaths[0])
        del served.decoder.stats


def test_an_engine_whose_first_pass_runs_is_alive(demo_model: Path):
    with serving(demo_model) as served:
        stats = served.decoder.stats()
        busy = stats | {"num_reading": 1}
        served.decoder.stats = lambda: busy  # type: ignore[method-assign]
        deaths: list[BaseException] = []
        served.service.die = deaths.append
        for seconds in (0, 70, 500):
            served.service._watch_engine(time.monotonic() + seconds)
        assert not deaths
        served.service._watch_engine(time.monotonic() + 700)
        assert deaths
        del served.decoder.stats


def test_a_model_that_cannot_be_loaded(tmp_path: Path):
    with Command(str(tmp_path), *COMMAND) as command:
        assert command.code() in (1, 2)
        assert any(line.startswith("error: ") for line in command.lines)


def test_a_model_of_nans(tmp_path: Path):
    with serving(write_nan_model(tmp_path / "model")) as served:
        body = {"prompt": [5, 6], "max_tokens": 4}
        response = served.post(COMPLETIONS, body)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "numeric_error"
        assert response.headers["x-should-retry"] == "false"
        events = events_of(served.post(COMPLETIONS, body | {"stream": True}).text)
        assert json.loads(events[-1])["error"]["code"] == "numeric_error"
        assert httpx.get(served.url + "/health").status_code == 200


def test_a_unix_socket(demo_model: Path, tmp_path: Path):
    path = tmp_path / "socket"
    with serving(demo_model, uds=str(path)) as served:
        assert served.url == f"unix:{path}"
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert client.get("http://server/health").status_code == 200
    assert not path.exists()


def test_tls(demo_model: Path, tmp_path: Path):
    files = tls_files(tmp_path)
    with serving(demo_model, **files) as served:
        assert served.url.startswith("https://")
        context = ssl.create_default_context(cafile=files["ssl_certfile"])
        assert httpx.get(served.url + "/health", verify=context).status_code == 200


def test_cors(demo_model: Path):
    origin = {"origin": "https://page.example"}
    with serving(demo_model, cors_origins=("https://page.example",), api_keys=("k",)) as served:
        asks = origin | {"access-control-request-method": "POST"}
        response = httpx.options(served.url + COMPLETIONS, headers=asks)
        assert response.headers["access-control-allow-origin"] == "https://page.example"
    with serving(demo_model) as served:
        response = httpx.get(served.url + "/health", headers=origin)
        assert "access-control-allow-origin" not in response.headers


def test_an_address_that_is_taken():
    first = listen(ServeConfig(port=0))
    port = first.getsockname()[1]
    with pytest.raises(ConfigError, match="cannot listen"):
        Run(lambda progress: None, ServeConfig(port=port))  # type: ignore[arg-type,return-value]
    first.close()


@pytest.mark.parametrize(
    "wrong",
    [{"port": -1}, {"max_n": 0}, {"queue_timeout_s": -1.0}, {"prefix_cache_scope": "all"},
     {"ssl_certfile": "x"}, {"api_keys": ("",)}, {"metrics_alias": "tgi"}, {"web": 1}],
)  # fmt: skip
def test_settings_are_checked(wrong: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ServeConfig(**wrong)


@pytest.mark.parametrize(
    ("name", "zero"), [("queue_timeout_s", "never"), ("shutdown_timeout_s", "at once")]
)
def test_the_error_of_a_time_says_what_0_means(name: str, zero: str):
    with pytest.raises(ConfigError, match=f"got -1.0, expected a number of seconds, 0 for {zero}"):
        ServeConfig(**{name: -1.0})


def test_every_setting_is_an_option_but_the_page_which_has_two_names():
    assert {field.name for field in dataclasses.fields(ServeConfig)} == {*SERVE_OPTION_HELP, "web"}


def test_keys_of_a_file(demo_model: Path, tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("first\n\n second \n")
    with Command(str(demo_model), *COMMAND, "--api-key-file", str(file)) as command:
        url = command.url()
        headers = {"authorization": "Bearer second"}
        assert httpx.get(url + "/v1/models", headers=headers).status_code == 200
        assert httpx.get(url + "/v1/models").status_code == 401
        assert not any("second" in line for line in command.lines)
