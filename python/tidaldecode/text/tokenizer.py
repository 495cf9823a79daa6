"""Text to token ids and back, and the chat template, as the model's folder defines them.

All of it happens in a process of its own (text_process.py, worker/): nothing that a folder's
tokenizer or template does can hold, crash or fill this one. Code from the folder is never run.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tidaldecode.checkpoint.json_file import open_regular_file, read_exactly
from tidaldecode.errors import ConfigError, InvalidArgument, TidalError, show
from tidaldecode.sampling import as_index
from tidaldecode.text.byte_text import ByteText
from tidaldecode.text.chat import Chat, check_text
from tidaldecode.text.prompts import MAX_PROMPT_ITEMS
from tidaldecode.text.text_process import Limits, TextProcess, TextProcessError

# The largest tokenizer.json of the supported families is about 12 MB.
_MAX_TOKENIZER_BYTES = 256 * 1024 * 1024
_MAIN_FILE = "tokenizer.json"
_OTHER_FILES = ("tokenizer.model", "vocab.json", "tekken.json")  # what transformers can convert
# Templates of public models render in milliseconds and give a little more than their messages.
TEMPLATE_SECONDS = 5.0
MAX_RENDERED_CHARS = 64 * 1024 * 1024
# A text takes some 0.7 s a megabyte and 140 bytes a byte; the slowest folder loads 1 MB in 0.1 s.
_SECONDS = 10.0
_BYTES_PER_SECOND = 200_000
_MEMORY_BYTES = 2 << 30
_MEMORY_PER_BYTE = 512
_MEMORY_PER_FILE_BYTE = 40
_CONVERT_MEMORY_BYTES = 16 << 30  # transformers and what it imports
_IDS_PER_SECOND = 20_000
_BLOCK = 256  # tokens whose bytes are asked for together
_LARGEST_ID = 2**32 - 1  # of the tokenizers library


class Tokenizer:
    """The tokenizer of a model folder."""

    def __init__(self, folder: Path, vocab_size: int, process: TextProcess | None = None) -> None:
        """Loads the tokenizer.

        Args:
            folder: the model folder.
            vocab_size: rows of the embedding table; a text with a token beyond them is refused.
            process: what start_tokenizer() gave for the folder; None starts one.

        Raises: ConfigError if there is none, or it is damaged or too big.
        """
        self._folder = folder
        self._vocab_size = vocab_size
        self._process = process if process is not None else start_tokenizer(folder)
        self._memory_bytes = _memory_of(folder)
        try:
            about = self._process.loaded()
        except TextProcessError as cause:
            self._process.close()
            raise self._error(cause, "the tokenizer cannot be loaded") from cause
        self.num_tokens: int = about["num_tokens"]
        self._token_bytes: dict[int, bytes] = {}  # those that were asked for
        self._shown_bytes: dict[int, bytes] = {}
        self.has_chat_template: bool = about["has_chat_template"]
        # The one that conversations with tools go through.
        self.chat_template: str | None = about["chat_template"]
        # Tokens that decoding leaves out, as they are written.
        self.special_tokens: frozenset[str] = frozenset(about["special_tokens"])
        self._special_ids: frozenset[int] = frozenset(about["special_ids"])
        # Special tokens by their names ("bos_token"), as chat templates see them.
        self.named_tokens: dict[str, str] = about["named_tokens"]
        # Whether a text is what the bytes of its tokens are together.
        self.joins_bytes: bool = about["joins_bytes"]

    @staticmethod
    def exists(folder: Path) -> bool:
        """True if the folder has a tokenizer, good or bad."""
        return any(os.path.lexists(folder / name) for name in (_MAIN_FILE, *_OTHER_FILES))

    def close(self) -> None:
        """Ends its process."""
        self._process.close()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokens the model wants around it (BOS).

        Raises: InvalidArgument for what is no text, is not valid Unicode, or has a token that the
            model has no row for.
        """
        return self.encode_texts([text], add_special_tokens=add_special_tokens)[0]

    def encode_texts(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """encode() of several texts, at once."""
        texts = [check_text(text) for text in texts]
        arguments = {"texts": texts, "add_special_tokens": add_special_tokens}
        batch = self._call("encode", arguments, self._text_limits(_SECONDS, texts))
        return [self._checked(ids) for ids in batch]

    def encode_following(self, text: str) -> list[int]:
        """Token ids of a text that follows others: nothing is put in front of it."""
        limits = self._text_limits(_SECONDS, [check_text(text)])
        return self._checked(self._call("encode_following", {"text": text}, limits))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids, special tokens left out unless they are wanted.

        As in transformers, ids that the tokenizer does not know have no text.

        Raises: InvalidArgument for anything but a list of ids.
        """
        ids = _check_ids(token_ids)
        arguments = {"token_ids": ids, "skip_special_tokens": skip_special_tokens}
        text: str = self._call("decode", arguments, self._id_limits(len(ids)))
        return text

    def tokenizer_json(self) -> str:
        """The tokenizer with all its added tokens, as a tokenizer.json would have it.

        Raises: ConfigError.
        """
        text: str = self._call("tokenizer_json", {}, self._text_limits(_SECONDS, []))
        return text

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        """The bytes that each token stands for in the midst of a text; they may be no character."""
        return self._look_up(self._token_bytes, token_ids)

    def shown_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        """token_bytes(), of special tokens none."""
        return self._look_up(self._shown_bytes, token_ids)

    def _look_up(self, known: dict[int, bytes], token_ids: Sequence[int]) -> list[bytes]:
        try:
            return [known[token_id] for token_id in token_ids]
        except KeyError:
            self._learn_bytes(token_ids)
        return [known[token_id] for token_id in token_ids]

    def _learn_bytes(self, token_ids: Sequence[int]) -> None:
        """Asks for tokens and for those beside them, which will be wanted soon."""
        blocks = {token_id // _BLOCK for token_id in _check_ids(token_ids)}
        for block in blocks:
            ids = list(range(block * _BLOCK, (block + 1) * _BLOCK))
            found = self._call("token_bytes", {"token_ids": ids}, self._id_limits(len(ids)))
            self._token_bytes.update(zip(ids, map(bytes.fromhex, found), strict=True))
            special = dict.fromkeys(self._special_ids.intersection(ids), b"")
            self._shown_bytes.update({each: self._token_bytes[each] for each in ids} | special)

    def detokenize(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What new tokens of several sequences add to their texts: worker/backend.py."""
        num_ids = sum(len(row["ids"]) for row in rows)
        arguments = {"rows": list(rows)}
        found: list[dict[str, Any]] = self._call("detokenize", arguments, self._id_limits(num_ids))
        return found

    def byte_text(self, prompt_ids: Sequence[int], *, skips: bool) -> ByteText:
        """The text that follows a prompt, of a tokenizer that joins bytes.

        Args:
            prompt_ids: its last tokens.
            skips: whether special tokens are left out.
        """
        return ByteText(prompt_ids, self.shown_bytes if skips else self.token_bytes)

    def render_chat(self, messages: Any, /, **options: Any) -> Any:
        """Token ids of a conversation, up to where the model's answer begins.

        Args:
            messages: {"role": ..., "content": ...} each, or a list of such conversations.
            options: those of text/chat.py, and variables of the template.

        Returns: the ids, or a list of them for a list of conversations.
        Raises:
            InvalidArgument: messages or options of another kind.
            ConfigError: no template, or one that fails or breaks its limits.
        """
        chat = Chat(messages, options)
        if chat.template is None and not self.has_chat_template:
            raise ConfigError(
                f"{self._folder}: has no chat template (chat_template.jinja or the field in "
                "tokenizer_config.json); write the prompt out and use generate(), or pass "
                "chat_template"
            )
        arguments = chat.arguments | {"max_chars": MAX_RENDERED_CHARS}
        limits = self._text_limits(TEMPLATE_SECONDS, chat.arguments)
        batch = [self._checked(ids) for ids in self._call("render", arguments, limits)]
        return batch if chat.is_batch else batch[0]

    def _call(self, name: str, arguments: dict[str, Any], limits: Limits) -> Any:
        try:
            return self._process.call(name, arguments, limits)
        except TextProcessError as cause:
            if cause.kind == "refused" or (name == "render" and arguments["template"] is not None):
                raise InvalidArgument(f"chat template: {_reason(cause)}") from cause
            what = "chat template" if name == "render" else f"tokenizer: {name.split('_')[0]}"
            raise self._error(cause, what) from cause

    def _error(self, cause: TextProcessError, what: str) -> TidalError:
        return ConfigError(f"{self._folder}: {what}: {_reason(cause)}")

    def _checked(self, ids: list[int]) -> list[int]:
        """Ids of a text, each a row of the embedding table."""
        largest = max(ids, default=0)
        if largest >= self._vocab_size:
            token = self._call("token_of", {"token_id": largest}, self._id_limits(1))
            raise InvalidArgument(
                f"prompt: holds the token {show(token)}, whose id is {largest}; expected ids below "
                f"the model's vocab_size {self._vocab_size}: leave it out"
            )
        return ids

    def _text_limits(self, seconds: float, texts: Any) -> Limits:
        num_bytes = _count_bytes(texts)
        return Limits(
            cpu_s=seconds + num_bytes / _BYTES_PER_SECOND,
            memory_bytes=self._memory_bytes + num_bytes * _MEMORY_PER_BYTE,
        )

    def _id_limits(self, num_ids: int) -> Limits:
        return Limits(
            cpu_s=_SECONDS + num_ids / _IDS_PER_SECOND,
            memory_bytes=self._memory_bytes + num_ids * _MEMORY_PER_BYTE,
        )


def _reason(cause: TextProcessError) -> str:
    """What a library or a template has said: one line, printable, bounded."""
    return show(str(cause), 300)[1:-1]


def start_tokenizer(folder: Path) -> TextProcess:
    """Starts the process that reads a folder's tokenizer, and does not wait for it.

    Raises: ConfigError if the folder has no tokenizer, or its files are none or too big.
    """
    if not Tokenizer.exists(folder):
        raise ConfigError(
            f"{folder}: has no tokenizer (tokenizer.json); pass token ids instead of text"
        )
    converts = not os.path.lexists(folder / _MAIN_FILE)
    size = _check_files(folder, _OTHER_FILES if converts else [_MAIN_FILE])
    if converts and importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            f"{folder}: has no tokenizer.json; to make one of its other files: "
            "pip install 'tidaldecode[hf]'"
        )
    limits = Limits(cpu_s=_SECONDS + size / _BYTES_PER_SECOND, memory_bytes=_memory_of(folder))
    if converts:
        limits = Limits(cpu_s=60 + limits.cpu_s, memory_bytes=limits.memory_bytes)
    arguments = {"folder": os.path.abspath(folder), "converts": converts}
    return TextProcess(arguments, limits)


def _memory_of(folder: Path) -> int:
    """Bytes of address space for a folder's tokenizer and short texts."""
    path = folder / _MAIN_FILE
    if not path.is_file():
        return _CONVERT_MEMORY_BYTES
    return _MEMORY_BYTES + _MEMORY_PER_FILE_BYTE * path.stat().st_size


def _check_files(folder: Path, names: Sequence[str]) -> int:
    """Sizes and kinds of the files, before a library opens them; returns their bytes."""
    total = 0
    for name in names:
        path = folder / name
        if not os.path.lexists(path):
            continue
        descriptor, size = open_regular_file(path, ConfigError)
        try:
            beginning = read_exactly(descriptor, 0, 200)
        except OSError as cause:
            raise ConfigError(f"{path}: cannot be read: {cause.strerror}") from cause
        finally:
            os.close(descriptor)
        if size > _MAX_TOKENIZER_BYTES:
            raise ConfigError(f"{path}: {size} bytes, expected at most {_MAX_TOKENIZER_BYTES}")
        _check_beginning(path, beginning)
        total += size
    return total


def _check_beginning(path: Path, beginning: bytes) -> None:
    """Names what downloads leave in the place of a file."""
    if beginning.startswith(b"version https://git-lfs.github.com/spec/"):
        raise ConfigError(
            f"{path}: is a git-lfs pointer, not the file itself; fetch it with git lfs pull"
        )
    is_page = beginning.lstrip().lower().startswith((b"<!doctype html", b"<html"))
    if is_page and path.suffix == ".json":
        raise ConfigError(f"{path}: is an HTML page, expected JSON; download the file again")


def _check_ids(token_ids: Any) -> list[int]:
    values = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
    if isinstance(values, (str, bytes, bytearray)) or not isinstance(values, Sequence):
        raise InvalidArgument(f"token_ids: got {show(token_ids)}, expected a list of token ids")
    if len(values) > MAX_PROMPT_ITEMS:
        raise InvalidArgument(
            f"token_ids: got {len(values):,} ids, expected at most {MAX_PROMPT_ITEMS:,}"
        )
    ids = []
    for position, value in enumerate(islice(values, len(values))):
        token_id = as_index(value)
        if token_id is None or not 0 <= token_id <= _LARGEST_ID:
            raise InvalidArgument(
                f"token_ids[{position}]: got {show(value)}, expected an integer from 0 to "
                f"{_LARGEST_ID}"
            )
        ids.append(token_id)
    return ids


def _count_bytes(value: Any) -> int:
    """Characters of all the text in a value; a character counts as one byte here."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_count_bytes(part) for entry in value.items() for part in entry)
    if isinstance(value, (list, tuple)):
        return sum(_count_bytes(part) for part in value)
    return 8
