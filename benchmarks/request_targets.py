"""Where bench_serve_core.py sends its requests, and how it reads the answers: Decoder.submit of its
own process, or `tidaldecode serve` over HTTP, which is a process of its own, as users start it.

The client of the second is one thread that splits what comes into events and notes the time. A
token is counted by its word: those of a folder with write_word_tokens() are a word each.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, Protocol

import orjson
import uvloop

import tidaldecode
from provenance import hardware_name
from tidaldecode.checkpoint.model_folder import read_model_folder

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_START_S = 300.0
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":(\d+)')


class Reader:
    """A request on its way, read to its end, with the time at which each token came."""

    def __init__(self) -> None:
        """The clock runs from here."""
        self.started = time.perf_counter()
        self.times: list[float] = []

    def join(self) -> None:
        """Waits for the end. Raises: RuntimeError for an answer that has failed."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Ends the request where it is."""
        raise NotImplementedError

    @property
    def first_token_s(self) -> float:
        return self.times[0] - self.started

    def gaps_ms(self, begin: float, end: float) -> list[float]:
        """Between tokens that came within the time."""
        times = [moment for moment in self.times if begin <= moment <= end]
        return [(b - a) * 1e3 for a, b in zip(times, times[1:], strict=False)]


class Target(Protocol):
    """What answers requests."""

    vocab_size: int
    about: dict[str, Any]  # device, plan, pages

    def ask(self, prompt: list[int], new_tokens: int, attention: str | None) -> Reader:
        """Sends a request. `attention` None is as the target was set up."""

    def num_pauses(self) -> int:
        """How often requests have been paused so far."""

    def costs(self) -> dict[str, float]:
        """What has been spent so far: passes, and the host's seconds between them; of a server also
        events, and seconds of processor time beside the engine."""

    def close(self) -> None:
        """Ends it."""


def _between_passes(stats: dict[str, Any]) -> dict[str, float]:
    return {"passes": stats["num_chunks"] + stats["num_steps"], "gap_s": stats["gap_s"]}


# --- Decoder.submit ---


class _SubmitReader(Reader):
    """Read by a thread of its own."""

    def __init__(self, request: tidaldecode.Request) -> None:
        super().__init__()
        self._request = request
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while self._request.status != "finished" or not self._has_all():
            self._request.read(0.1)
            now = time.perf_counter()
            self.times += [now] * (len(self._request.token_ids) - len(self.times))

    def _has_all(self) -> bool:
        return len(self.times) == len(self._request.result().token_ids)

    def join(self) -> None:
        self._thread.join()

    def cancel(self) -> None:
        self._request.cancel()
        self._thread.join()


class SubmitTarget:
    """A decoder of this process."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        """Loads it with the options of Decoder."""
        self._decoder = tidaldecode.Decoder(folder, **options)
        self.vocab_size = self._decoder.model.vocab_size
        self.about = _about(self._decoder.config.device, self._decoder.plan, self._decoder.stats())

    def ask(self, prompt: list[int], new_tokens: int, attention: str | None) -> Reader:
        return _SubmitReader(
            self._decoder.submit(
                prompt, max_new_tokens=new_tokens, temperature=0, ignore_eos=True,
                attention=attention,
            )
        )  # fmt: skip

    def num_pauses(self) -> int:
        return self._decoder.stats()["num_pauses"]

    def costs(self) -> dict[str, float]:
        return _between_passes(self._decoder.stats())

    def close(self) -> None:
        self._decoder.close()


# --- HTTP ---


def num_words(event: bytes) -> int:
    """Tokens in the text of an event: a word each, and one if it has no word."""
    _, _, text = event.partition(b'"text":"')
    return 0 if text[:1] in (b"", b'"') else max(1, text.count(b" "))


class _HttpReader(Reader, asyncio.Protocol):
    """A connection with one streamed completion, in the client's loop."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__()
        data = orjson.dumps(body)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        head += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data)
        self.request = head + data
        self.num_events = 0
        self.problem: str | None = "it has been broken off"
        self.has_ended = threading.Event()
        self._rest = b""
        self._transport: asyncio.Transport | None = None
        self._is_cancelled = False

    def connection_made(self, transport: Any) -> None:
        self._transport, self._loop = transport, asyncio.get_running_loop()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            self.times += [now] * num_words(event)
            self.num_events += 1
            if b"completion_tokens" in event:
                self._check_count(event)
            elif b"data: [DONE]" not in event and b'"error":' in event:
                self.problem = event.decode()

    def _check_count(self, event: bytes) -> None:
        found = _COMPLETION_TOKENS.search(event)
        said = int(found[1]) if found else -1
        wrong = f"{len(self.times)} tokens have come of {said}"
        self.problem = None if said == len(self.times) else wrong

    def connection_lost(self, problem: Exception | None) -> None:
        self.has_ended.set()

    def join(self) -> None:
        self.has_ended.wait()
        if self.problem is not None and not self._is_cancelled:
            raise RuntimeError(f"request: {self.problem}; {self._rest[:500]!r}")

    def cancel(self) -> None:
        self._is_cancelled = True
        if self._transport is not None:
            self._loop.call_soon_threadsafe(self._transport.abort)
        self.has_ended.wait()


class HttpTarget:
    """A server, and the thread that is its client."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        """Starts the command, with the options of Decoder; waits until it serves."""
        command = [sys.executable, "-m", "tidaldecode", "serve", str(folder), "--port", "0"]
        for name, value in options.items():
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            command += [f"--{name.replace('_', '-')}", text]
        self._server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._url = self._address()
        model = read_model_folder(folder, options.get("load_format", "auto")).model
        self.vocab_size = model.vocab_size
        info = self._info()
        self.about = _about(info["device"], info["plan"], info["stats"])
        self._readers: list[_HttpReader] = []
        self._loop = uvloop.new_event_loop()
        self._client = threading.Thread(target=self._loop.run_forever)
        self._client.start()

    def _address(self) -> str:
        assert self._server.stderr is not None
        said = ""
        for line in iter(self._server.stderr.readline, ""):
            said += line
            if line.startswith("Serving "):
                # What it says later is read too, or it would wait for a reader.
                threading.Thread(target=self._server.stderr.read, daemon=True).start()
                return line.split(" at ")[-1].strip()
        raise RuntimeError(f"the server has ended: {said}")

    def _info(self) -> dict[str, Any]:
        with urllib.request.urlopen(self._url + "/server_info", timeout=60) as answer:
            return json.load(answer)

    def ask(self, prompt: list[int], new_tokens: int, attention: str | None) -> Reader:
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        if attention is not None:
            body["attention"] = attention
        reader = _HttpReader(body)
        self._readers.append(reader)
        host, port = self._url.removeprefix("http://").split(":")
        connecting = self._loop.create_connection(lambda: reader, host, int(port))
        asyncio.run_coroutine_threadsafe(connecting, self._loop).result()
        return reader

    def num_pauses(self) -> int:
        return self._info()["stats"]["num_pauses"]

    def costs(self) -> dict[str, float]:
        client = time.clock_gettime(time.pthread_getcpuclockid(self._client.ident or 0))
        pid = self._server.pid  # whose main thread is its event loop
        stat = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
        server = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        events = sum(reader.num_events for reader in self._readers)
        between = _between_passes(self._info()["stats"])
        return {"events": events, "client_s": client, "server_s": server} | between

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._client.join()
        self._loop.close()
        self._server.send_signal(signal.SIGTERM)
        try:
            self._server.wait(30)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()


TARGETS: dict[str, type[SubmitTarget] | type[HttpTarget]] = {
    "submit": SubmitTarget,
    "http": HttpTarget,
}


def _about(device: str, plan: str, stats: dict[str, int]) -> dict[str, Any]:
    pages = sum(stats[name] for name in ("pages_free", "pages_held", "pages_cached"))
    return {"device": hardware_name(device), "plan": plan, "num_pages": pages}


def write_word_tokens(folder: Path, vocab_size: int) -> None:
    """Gives a folder a tokenizer whose every token is a space and a word of four letters."""
    vocab = {}
    for token_id in range(vocab_size):
        letters = [_LETTERS[token_id // 26**place % 26] for place in range(4)]
        vocab["Ġ" + "".join(letters)] = token_id
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "post_processor": None,
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True
        },
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True
        },
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
