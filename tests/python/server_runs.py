"""Runs of feature_runs.py for the server's command: on the device, with every option."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

from feature_runs import PLAN_OPTIONS, Bench, used_options, uses
from tidaldecode.cli import app

KEY = {"authorization": "Bearer other"}


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _post(client: httpx.Client, route: str, **body: Any) -> Any:
    """What a route answers, which must be an answer."""
    body |= {"model": "served"}
    answer = client.post(route, json=body, headers=KEY, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json() if "json" in answer.headers["content-type"] else answer.text


def _complete(client: httpx.Client) -> None:
    answer = _post(client, "/v1/completions", prompt="The sky", max_tokens=8, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 8


def _ask_all_routes(client: httpx.Client) -> None:
    """One answer of each route and kind, in whole or in a stream."""
    chat, ask = "/v1/chat/completions", [{"role": "user", "content": "Where?"}]
    schema = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}}
    schema |= {"required": ["city"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    for more in ({}, {"verify": True}, {"attention": "full"}):
        answer = _post(client, chat, messages=ask, response_format=form, max_tokens=60, **more)
        assert json.loads(answer["choices"][0]["message"]["content"])["city"] in ("Oslo", "Rome")
    tools = [{"type": "function", "function": {"name": "place", "parameters": schema}}]
    answer = _post(
        client, chat, messages=ask, tools=tools, tool_choice="required",
        parallel_tool_calls=False, max_tokens=99,
    )  # fmt: skip
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome")
    few = {"max_tokens": 5, "temperature": 0}
    text = _post(client, chat, messages=ask, **few)["choices"][0]["message"]["content"]
    streamed = _post(client, chat, messages=ask, stream=True, **few)
    assert streamed.endswith("data: [DONE]\n\n")
    message = _post(client, "/v1/messages", messages=ask, **few)
    assert "".join(block["text"] for block in message["content"]) == text
    assert "message_stop" in _post(client, "/v1/messages", messages=ask, stream=True, **few)
    assert _post(client, "/v1/messages/count_tokens", messages=ask)["input_tokens"] > 0
    few["max_output_tokens"] = few.pop("max_tokens")
    response = _post(client, "/v1/responses", input="Where?", **few)
    assert response["output"][0]["content"][0]["text"] == text
    streamed = _post(client, "/v1/responses", input="Where?", stream=True, **few)
    assert "response.output_text.done" in streamed
    ids = _post(client, "/tokenize", prompt=text)["tokens"]
    assert _post(client, "/detokenize", tokens=ids, skip_special_tokens=True)["prompt"] == text
    about = ("/v1/models", "/version", "/server_info", "/tokenizer_info")
    for route in ("/live", "/health", "/metrics", *about):
        assert client.get(route, headers=KEY).status_code == 200, route


class _Visitor(threading.Thread):
    """Visits the server once it is ready, and then has it end."""

    def __init__(self, client: httpx.Client, visit: Callable[[httpx.Client], None]) -> None:
        super().__init__()
        self.problem: Exception | None = None
        self._client = client
        self._visit = visit

    def run(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                if self._client.get("/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        try:
            self._visit(self._client)
        except Exception as problem:
            self.problem = problem
        finally:
            os.kill(os.getpid(), signal.SIGTERM)


def _serve(
    bench: Bench,
    client: httpx.Client,
    model: str,
    *arguments: str,
    visit: Callable[[httpx.Client], None] = _complete,
) -> None:
    """Runs the command in this thread, as signals want it, and visits it from another."""
    visitor = _Visitor(client, visit)
    visitor.start()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    bench.command("serve", model, "--served-model-name", "served", *arguments)
    visitor.join()
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert after == handlers, "Ctrl-C would do nothing any more"
    if visitor.problem is not None:
        raise visitor.problem


@uses("tidaldecode serve")
def serve_command(bench: Bench) -> None:
    port, keys = _free_port(), bench.folder / "keys"
    keys.write_text("other\n")
    sizes = [
        "--max-queued-requests", "9", "--max-queued-tokens", "4000", "--max-body-mb", "2",
        "--max-n", "3", "--max-stop", "4", "--max-logprobs", "5", "--max-tools", "6",
        "--default-max-tokens", "7", "--stream-interval", "2",
    ]  # fmt: skip
    times = [
        "--queue-timeout-s", "50", "--request-timeout-s", "60", "--shutdown-timeout-s", "5",
        "--sse-keep-alive-s", "3", "--step-timeout-s", "90", "--slow-client-timeout-s", "9",
        "--header-timeout-s", "8",
    ]  # fmt: skip
    others = [
        "--api-key", "one", "--api-key-file", str(keys), "--prefix-cache-scope", "shared",
        "--cors-origin", "*", "--metrics-alias", "vllm", "--no-web",
    ]  # fmt: skip
    engine = [
        "--max-batch-size", "3", "--num-pages", "40", "--page-size", "16", "--max-seq-len", "256",
        "--kv-dtype", bench.dtype, "--gpu-memory-utilization", "0.5", "--no-prefix-cache",
        "--max-chunk-ms", "30", "--decode-share", "0.5", "--prefill-chunk", "64", "--num-threads",
        "1", "--load-format", "auto", "--weight-format", "int4", "--lm-head-format", "fp8",
        "--attention", "tidal", "--select-layers", "2", "--scored-layers", "5", "--token-budget",
        "32", "--correction-interval", "8", "--activation-format", "16bit",
    ]  # fmt: skip
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        address = ["--host", "127.0.0.1", "--port", port]
        _serve(
            bench,
            client,
            str(bench.model),
            *address,
            *sizes,
            *times,
            *others,
            *engine,
            *PLAN_OPTIONS,
        )


@uses("every route of serve")
def serve_routes(bench: Bench) -> None:
    port = _free_port()
    small = ["--max-batch-size", "2", "--max-seq-len", "512", "--num-threads", "1"]
    small += ["--token-budget", "32", "--scored-layers", "2,5", "--tool-call-parser", "json"]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        _serve(bench, client, str(bench.model), "--port", port, *small,
               "--reasoning-parser", "none", visit=_ask_all_routes)  # fmt: skip


@uses("serve at other sockets")
def serve_at_other_sockets(bench: Bench) -> None:
    small = ["--max-batch-size", "2", "--max-seq-len", "256", "--num-threads", "1", "--web"]
    small += ["--prefix-cache", "--verify", "--drafts", "both", "--draft-tokens", "3"]
    path = bench.folder / "socket"
    transport = httpx.HTTPTransport(uds=str(path))
    with httpx.Client(base_url="http://server", transport=transport) as client:
        _serve(bench, client, str(bench.model), "--uds", str(path), *small)
    if shutil.which("openssl") is None:
        return
    key, certificate = bench.folder / "key.pem", bench.folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    port = _free_port()
    files = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--revision", "main"]
    bench.cache_model("org/name")
    with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=False) as client:
        _serve(bench, client, "org/name", "--port", port, *small, *files)


@uses()
def serve_by_replicas(bench: Bench) -> None:
    """Without a row of its own, for Ray may not be there; test_conformance_ray.py has the CPU."""
    assert app.main(["serve", str(bench.model), "--ray", "0"]) == 2
    assert "ray: got 0" in bench.capsys.readouterr().err
    used_options.setdefault("serve", set()).add("--ray")
    if bench.device == "cpu" or importlib.util.find_spec("ray") is None:
        return
    port = _free_port()
    small = ["--max-batch-size", "2", "--max-seq-len", "512", "--tool-call-parser", "json"]
    small += ["--ray", "1"]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        _serve(bench, client, str(bench.model), "--port", port, *small, visit=_ask_all_routes)
