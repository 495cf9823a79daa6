"""Runs of feature_runs.py for the server's command: on the device, with every option."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time

import httpx

from feature_runs import PLAN_OPTIONS, Bench, uses

KEY = {"authorization": "Bearer other"}


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class _Visitor(threading.Thread):
    """Asks the server for an answer once it is ready, and then has it end."""

    def __init__(self, client: httpx.Client) -> None:
        super().__init__()
        self.answer: httpx.Response | None = None
        self._client = client

    def run(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                if self._client.get("/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        body = {"prompt": "The sky", "max_tokens": 8, "ignore_eos": True, "model": "served"}
        try:
            self.answer = self._client.post("/v1/completions", json=body, headers=KEY, timeout=60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)


def _serve(bench: Bench, client: httpx.Client, model: str, *arguments: str) -> None:
    """Runs the command in this thread, as signals want it, and visits it from another."""
    visitor = _Visitor(client)
    visitor.start()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    bench.command("serve", model, "--served-model-name", "served", *arguments)
    visitor.join()
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert after == handlers, "Ctrl-C would do nothing any more"
    assert visitor.answer is not None and visitor.answer.status_code == 200
    assert visitor.answer.json()["usage"]["completion_tokens"] == 8


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
        "1", "--load-format", "auto", "--attention", "tidal", "--select-layers", "2",
        "--scored-layers", "5", "--token-budget", "32", "--correction-interval", "8",
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


@uses("serve at other sockets")
def serve_at_other_sockets(bench: Bench) -> None:
    small = ["--max-batch-size", "2", "--max-seq-len", "256", "--num-threads", "1", "--web"]
    small += ["--prefix-cache", "--verify", "--draft-tokens", "3"]
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
