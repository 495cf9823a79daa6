"""ServeConfig: how the server is reached, what it takes, and how long it waits."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from tidaldecode.errors import ConfigError, show
from tidaldecode.text.tool_calls import TOOL_FORMATS

PREFIX_CACHE_SCOPES = ("key", "shared")
METRICS_ALIASES = ("vllm",)
TOOL_CALL_PARSERS = ("auto", "none", *TOOL_FORMATS)
REASONING_PARSERS = ("auto", "none")

_WORDS: dict[str, tuple[str, ...]] = {
    "prefix_cache_scope": PREFIX_CACHE_SCOPES,
    "metrics_alias": METRICS_ALIASES,
    "tool_call_parser": TOOL_CALL_PARSERS,
    "reasoning_parser": REASONING_PARSERS,
}
_INTEGERS = {
    "port": (0, 65535),
    "max_queued_requests": (1, 1_000_000),
    "max_queued_tokens": (1, 2**40),
    "max_body_mb": (1, 4096),
    "max_n": (1, 128),
    "max_stop": (1, 16),
    "max_logprobs": (0, 20),
    "max_tools": (0, 4096),
    "stream_interval": (1, 4096),
    "default_max_tokens": (1, 2**31 - 1),
    "ray": (1, 1024),
}
# Times, and what 0 of them means.
_SECONDS = {
    "queue_timeout_s": "never",
    "request_timeout_s": "never",
    "shutdown_timeout_s": "at once",
    "sse_keep_alive_s": "never",
    "step_timeout_s": "never",
    "slow_client_timeout_s": "never",
    "header_timeout_s": "never",
}
_MAY_BE_NONE = (
    "uds", "max_queued_tokens", "default_max_tokens", "metrics_alias", "ssl_certfile",
    "ssl_keyfile", "ray",
)  # fmt: skip

# The settings that are options of the command: their help, in the order that it has there.
SERVE_OPTION_HELP = {
    "host": "Address to listen at.",
    "port": "0 is any that is free.",
    "uds": "A Unix socket instead of host and port.",
    "api_keys": "Requests need one of these; may be repeated.",
    "served_model_names": "What clients call the model; default: its folder's name.",
    "prefix_cache_scope": "key: requests with other keys share no pages; or shared.",
    "max_queued_requests": "More are refused (503).",
    "max_queued_tokens": "Prompt tokens that may wait; more are refused (503).",
    "max_body_mb": "MiB of a request.",
    "max_n": "Answers to a prompt.",
    "max_stop": "Stop strings.",
    "max_logprobs": "Alternatives of a token.",
    "max_tools": "Tools of a chat.",
    "tool_call_parser": "How the model writes calls of tools; none: it has no tools.",
    "reasoning_parser": "none: reasoning is not told from content.",
    "default_max_tokens": "Of a chat that does not say; default: to the context's end.",
    "queue_timeout_s": "Longest wait for a row; 0 is for ever.",
    "request_timeout_s": "Longest answer; 0 is for ever.",
    "shutdown_timeout_s": "For answers under way, at the end.",
    "sse_keep_alive_s": "A stream that is silent so long gets a comment.",
    "stream_interval": "Tokens per event of a stream.",
    "step_timeout_s": "An engine that does nothing for so long is dead.",
    "slow_client_timeout_s": "A client that reads nothing for so long is dropped.",
    "header_timeout_s": "For the head of a request.",
    "cors_origins": "Web origins that may use the server; may be repeated.",
    "ssl_certfile": "For TLS.",
    "ssl_keyfile": "Its private key.",
    "metrics_alias": "vllm: metrics under vLLM's names as well.",
    "ray": "Replicas of the server on a Ray cluster of this machine, a GPU for each.",
}


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of a server. Immutable; checked on construction. Times are in seconds, 0 is never
    (of shutdown_timeout_s at once).

    Args:
        host: the address to listen at.
        port: 0 is any that is free.
        uds: path of a Unix socket, instead of host and port.
        api_keys: a request has one of these; none: all are let in.
        served_model_names: what clients may call the model; none: its folder's name.
        prefix_cache_scope: "key": requests with different keys never share a prompt's pages;
            "shared": they do.
        max_queued_requests: answers that may wait for a row; more are refused (503).
        max_queued_tokens: prompt tokens that may wait; None is any number.
        max_body_mb: largest body of a request, in MiB.
        max_n: most answers to one prompt.
        max_stop: most stop strings.
        max_logprobs: most alternatives for a token.
        max_tools: most tools.
        tool_call_parser: how the model writes calls of tools; "auto": as its chat template says,
            "none": it has no tools.
        reasoning_parser: "auto" tells reasoning from content where the chat template has tags for
            it; "none": all is content.
        default_max_tokens: of a chat that does not say; None: to the end of the context.
        queue_timeout_s: a request that has waited so long is refused (503).
        request_timeout_s: one that has taken so long is ended (408).
        shutdown_timeout_s: how long requests may go on once the server is told to end.
        sse_keep_alive_s: a stream that has been silent so long gets a comment.
        stream_interval: tokens per event of a stream.
        step_timeout_s: the engine counts as dead if no pass ends for so long; while prompts are
            read, for ten times as long.
        slow_client_timeout_s: a client that takes nothing for so long is dropped.
        header_timeout_s: a client has so long to send the head of a request, and between two pieces
            of its body.
        cors_origins: web origins whose pages may use the server; "*" is all.
        ssl_certfile: for TLS; needs ssl_keyfile.
        ssl_keyfile: its private key.
        metrics_alias: "vllm" gives all metrics under vLLM's names too.
        web: whether the page is served.
        ray: replicas of the server on a Ray cluster of this machine; None: one, without Ray.

    Raises: ConfigError naming the setting.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    api_keys: tuple[str, ...] = ()
    served_model_names: tuple[str, ...] = ()
    prefix_cache_scope: str = "key"
    max_queued_requests: int = 512
    max_queued_tokens: int | None = None
    max_body_mb: int = 32
    max_n: int = 16
    max_stop: int = 16
    max_logprobs: int = 20
    max_tools: int = 128
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    default_max_tokens: int | None = None
    queue_timeout_s: float = 600.0
    request_timeout_s: float = 0.0
    shutdown_timeout_s: float = 30.0
    sse_keep_alive_s: float = 15.0
    stream_interval: int = 1
    step_timeout_s: float = 60.0
    slow_client_timeout_s: float = 60.0
    header_timeout_s: float = 30.0
    cors_origins: tuple[str, ...] = ()
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    metrics_alias: str | None = None
    web: bool = True
    ray: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in _MAY_BE_NONE:
                continue
            _check(field.name, value)
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError(
                "ssl_certfile: got one of ssl_certfile and ssl_keyfile, expected both"
            )

        if self.ray is not None and self.uds is not None:
            raise ConfigError(
                f"uds: got {show(self.uds)} with ray, expected host and port: replicas listen at "
                "ports of this machine, which a socket's permissions do not guard"
            )

    @property
    def max_body_bytes(self) -> int:
        return self.max_body_mb * 2**20


def _check(name: str, value: Any) -> None:
    if name in _WORDS:
        expected = " or ".join(repr(word) for word in _WORDS[name])
        is_right = isinstance(value, str) and value in _WORDS[name]
    elif name in _INTEGERS:
        low, high = _INTEGERS[name]
        expected = f"an integer from {low} to {high}"
        is_right = type(value) is int and low <= value <= high
    elif name in _SECONDS:
        expected = f"a number of seconds, 0 for {_SECONDS[name]}"
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_right = is_number and math.isfinite(value) and value >= 0
    elif name == "web":
        expected, is_right = "True or False", isinstance(value, bool)
    elif name in ("api_keys", "served_model_names", "cors_origins"):
        expected = "texts that are not empty"
        is_right = isinstance(value, tuple) and all(isinstance(v, str) and v for v in value)
    else:
        expected, is_right = "a text that is not empty", isinstance(value, str) and bool(value)
    if not is_right:
        # A key is nobody's to read, not even in an error.
        got = "something else" if name == "api_keys" else show(value)
        raise ConfigError(f"{name}: got {got}, expected {expected}")
