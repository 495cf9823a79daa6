"""Text to token ids and back, and the chat template, as the model's folder defines them.

Called by decoder.py, and only where text is involved: transformers takes a second to import. The
tokenizer is transformers' AutoTokenizer in its fast (Rust) form. Code from the folder is never run;
chat templates run in transformers' sandbox, here with limits on time and size.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tidaldecode.checkpoint.json_file import MAX_JSON_BYTES, open_regular_file
from tidaldecode.errors import ConfigError, InvalidArgument, show

# The largest tokenizer.json of the supported families is about 12 MB.
_MAX_TOKENIZER_BYTES = 256 * 1024 * 1024
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Templates of public models render in milliseconds and give a little more than their messages.
TEMPLATE_SECONDS = 5.0
MAX_RENDERED_CHARS = 64 * 1024 * 1024


class Tokenizer:
    """The tokenizer of a model folder."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        """Loads the tokenizer.

        Args:
            folder: the model folder.
            vocab_size: rows of the embedding table; there may be more rows than tokens, not fewer.

        Raises: ConfigError if there is none, or it is damaged, too big or does not fit the model.
        """
        self._folder = folder
        _check_files(folder)
        self._hf = _load(folder)
        if not getattr(self._hf, "is_fast", False):
            raise ConfigError(
                f"{folder}: its tokenizer has no fast form; expected a tokenizer.json"
            )
        if len(self._hf) > vocab_size:
            raise ConfigError(
                f"{folder}: the tokenizer has {len(self._hf)} tokens, but the model only "
                f"vocab_size {vocab_size}; they do not belong together"
            )

    @staticmethod
    def exists(folder: Path) -> bool:
        """True if the folder has a tokenizer, good or bad."""
        return any(os.path.lexists(folder / name) for name in _TOKENIZER_FILES)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokens the model wants around it (BOS).

        Raises: InvalidArgument for text that is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as cause:
            raise InvalidArgument(
                f"prompt: got the lone surrogate {show(text[cause.start])} at {cause.start}, "
                "expected text that can be written as UTF-8"
            ) from None
        # verbose: no advice about lengths, the engine checks them.
        ids: list[int] = self._hf.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self._hf.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    @property
    def has_chat_template(self) -> bool:
        """True if the folder defines how a conversation becomes a prompt."""
        return bool(self._hf.chat_template)

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins.

        Args:
            messages: {"role": ..., "content": ...} each.

        Raises:
            InvalidArgument: messages of another kind.
            ConfigError: no template, or one that fails or breaks its limits.
        """
        conversation = _check_messages(messages)
        if not self.has_chat_template:
            raise ConfigError(
                f"{self._folder}: has no chat template (chat_template.jinja or the field in "
                "tokenizer_config.json); write the prompt out and use generate()"
            )
        text = _with_time_limit(
            lambda: self._hf.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            ),
            str(self._folder),
        )
        if not isinstance(text, str) or len(text) > MAX_RENDERED_CHARS:
            raise ConfigError(
                f"{self._folder}: chat template: gave {len(text)} characters, "
                f"expected at most {MAX_RENDERED_CHARS}"
            )
        # The template writes BOS itself.
        return self.encode(text, add_special_tokens=False)


def _check_files(folder: Path) -> None:
    """Sizes and kinds of the files, before a library opens them."""
    if not Tokenizer.exists(folder):
        raise ConfigError(
            f"{folder}: has no tokenizer (tokenizer.json); pass token ids instead of text"
        )
    limits = dict.fromkeys(_TOKENIZER_FILES, _MAX_TOKENIZER_BYTES)
    limits.update(dict.fromkeys(_SIDE_FILES, MAX_JSON_BYTES))
    for name, limit in limits.items():
        path = folder / name
        if not os.path.lexists(path):
            continue
        descriptor, size = open_regular_file(path, ConfigError)
        os.close(descriptor)
        if size > limit:
            raise ConfigError(f"{path}: {size} bytes, expected at most {limit}")


def _auto_tokenizer_class() -> Any:
    """transformers' AutoTokenizer, imported without its remark that there is no PyTorch."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(is_wanted)
    try:
        from transformers import AutoTokenizer
    finally:
        logger.removeFilter(is_wanted)
    return AutoTokenizer


def _load(folder: Path) -> Any:
    try:
        return _auto_tokenizer_class().from_pretrained(
            str(folder), use_fast=True, trust_remote_code=False, local_files_only=True
        )
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as cause:  # panics of the Rust library are no Exception
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise ConfigError(
            f"{folder}: the tokenizer cannot be loaded: {show(reason, 300)}"
        ) from cause


def _check_messages(messages: Any) -> list[dict[str, Any]]:
    expected = 'a list of {"role": "user", "content": "..."}'
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidArgument(f"messages: got {show(messages)}, expected {expected}")
    if not messages:
        raise InvalidArgument(f"messages: got an empty list, expected {expected}")
    for index, message in enumerate(messages):
        fits = isinstance(message, Mapping) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not fits:
            raise InvalidArgument(f"messages[{index}]: got {show(message)}, expected {expected}")
    return [dict(message) for message in messages]


class _TemplateTimeout(BaseException):
    """Thrown into the thread of a template that takes too long."""


def _with_time_limit(render: Any, where: str) -> Any:
    """Runs `render` in a thread and stops it after TEMPLATE_SECONDS.

    Compiled templates are Python code, so an exception thrown into their thread ends any loop.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["text"] = render()
        except BaseException as cause:
            outcome["error"] = cause

    thread = threading.Thread(target=run, name="chat-template", daemon=True)
    thread.start()
    thread.join(TEMPLATE_SECONDS)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_TemplateTimeout)
        )
        thread.join(1.0)
        raise ConfigError(f"{where}: chat template: still running after {TEMPLATE_SECONDS:g} s")
    if "error" in outcome:
        cause = outcome["error"]
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise ConfigError(f"{where}: chat template: {show(reason, 300)}") from cause
    return outcome["text"]
