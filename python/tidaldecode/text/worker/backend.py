"""A folder's tokenizer as transformers would set it up, from tokenizer.json and its side files.

The ids are those of tokenizer.json, whatever class tokenizer_config.json names. As in transformers
5, its post-processor alone decides about BOS and EOS, named special tokens become special ones, and
padding and truncation are off.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from .detokenizer import IncrementalDetokenizer
from .errors import TextError
from .files import read_json
from .known_texts import KnownTexts
from .prefix import without_prefix
from .templates import ChatTemplates, Conversation

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# What transformers takes back after decoding when clean_up_tokenization_spaces is true.
_CLEAN_UPS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level encodings write bytes as: GPT-2's."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {chr(byte): byte for byte in shown}
    return alphabet | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Backend:
    """The tokenizer and the chat templates of one folder."""

    def __init__(self, folder: str, converts: bool) -> None:
        """Reads the folder.

        Args:
            folder: absolute path.
            converts: without a tokenizer.json, let transformers make a tokenizer of other files.
        """
        config = read_json(os.path.join(folder, "tokenizer_config.json"))
        if converts:
            self._tokenizer, self._named = _convert(folder)
        else:
            # from_file() wants a path in UTF-8. The parent has checked what kind of file it is.
            with open(os.path.join(folder, "tokenizer.json"), "rb") as file:
                self._tokenizer = Tokenizer.from_buffer(file.read())
            self._named = _add_tokens(self._tokenizer, config, folder)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
        # As in transformers: cleaning up would corrupt the text of byte-pair encodings.
        self._cleans_up = (
            config.get("clean_up_tokenization_spaces") is True
            and type(self._tokenizer.model).__name__ != "BPE"
        )
        self._added = self._tokenizer.get_added_tokens_decoder()
        # A text is what the bytes of its tokens are together.
        self.joins_bytes = (
            type(self._tokenizer.decoder).__name__ == "ByteLevel" and not self._cleans_up
        )
        self._unprefixed = without_prefix(self._tokenizer)
        self._templates = ChatTemplates(folder, config, self._named)
        # Where something is put in front of a text, its rest is no text of its own.
        self._known_texts = KnownTexts(
            self._added if self._unprefixed is None else {}, lambda text: self._encode(text, False)
        )

    def describe(self) -> dict[str, Any]:
        """What the parent wants to know before any text comes."""
        special = {
            token_id: token.content
            for token_id, token in self._added.items()
            if self.decode([token_id], True) == "" != self.decode([token_id], False)
        }
        return {
            "num_tokens": self._tokenizer.get_vocab_size(with_added_tokens=True),
            "has_chat_template": self._templates.exists,
            "chat_template": self._templates.with_tools,
            "special_tokens": list(special.values()),
            "special_ids": list(special),
            "named_tokens": self._named,
            "joins_bytes": self.joins_bytes,
        }

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text."""
        return [self._encode(text, add_special_tokens) for text in texts]

    def encode_following(self, text: str) -> list[int]:
        """Token ids of a text that follows others: no BOS, and no space put in front.

        A tokenizer that marks the beginning of a text does so after special tokens too; there the
        mark stays.
        """
        if self._unprefixed is None:
            return self._encode(text, False)
        start = self._first_added_token(text)
        tokenizer, parts = (
            self._tokenizer,
            (self._tokenizer.normalizer, self._tokenizer.pre_tokenizer),
        )
        tokenizer.normalizer, tokenizer.pre_tokenizer = self._unprefixed
        try:
            ids = self._encode(text[:start], False)
        finally:
            tokenizer.normalizer, tokenizer.pre_tokenizer = parts
        return ids + (self._encode(text[start:], False) if start < len(text) else [])

    def tokenizer_json(self) -> str:
        """The whole tokenizer, as a tokenizer.json would have it."""
        return self._tokenizer.to_str()

    def token_bytes(self, token_ids: Sequence[int]) -> list[str]:
        """The bytes that each token stands for in the midst of a text, as hexadecimal digits."""
        return [self._token_bytes(token_id).hex() for token_id in token_ids]

    def token_of(self, token_id: int) -> str | None:
        """The token with this id."""
        return self._tokenizer.id_to_token(token_id)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of token ids; ids that the tokenizer does not know have none."""
        text = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        if self._cleans_up:
            for written, meant in _CLEAN_UPS:
                text = text.replace(written, meant)
        return text

    def detokenize(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The text that the new tokens of some sequences add to each.

        Args:
            rows: of each sequence the state that the last call gave (None at first), the ids of
                its prompt's end (at first), its new ids, whether special tokens are skipped, and
                whether it ends here.

        Returns: for each its state and pieces of text, one for every token and one for the end.
        """
        return [self._detokenize(**row) for row in rows]

    def render(
        self, conversations: Sequence[Conversation], max_chars: int, **options: Any
    ) -> list[list[int]]:
        """Token ids of conversations through the chat template; the template writes BOS itself."""
        rendered = []
        for text in self._templates.render(conversations, **options):
            if len(text) > max_chars:
                raise TextError(
                    "failed", f"gave {len(text)} characters, expected at most {max_chars}"
                )
            try:
                text.encode()
            except UnicodeEncodeError as cause:
                raise TextError("failed", f"gave a lone surrogate at {cause.start}") from cause
            rendered.append(self._known_texts.ids_of(text))
        return rendered

    def _token_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self.joins_bytes:
            values = [_BYTE_OF.get(character) for character in token]
            return token.encode() if None in values else bytes(values)  # type: ignore[arg-type]
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        # At the beginning of a text some decoders take a space away.
        before = self.decode([self._anchor], False)
        return self.decode([self._anchor, token_id], False)[len(before) :].encode()

    @functools.cached_property
    def _anchor(self) -> int:
        """A token whose text is the same whatever follows."""
        count = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return next((i for i in range(count) if self.decode([i], False).isalnum()), 0)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # The fast form leaves out where in the text each token was.
        (encoding,) = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        return encoding.ids

    def _first_added_token(self, text: str) -> int:
        """Where the first added token of a text begins; its length if there is none."""
        contents = [re.escape(token.content) for token in self._added.values() if token.content]
        if not contents or not re.search("|".join(contents), text):
            return len(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        starts = (
            start
            for token_id, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)
            if token_id in self._added
        )
        return next(starts, len(text))

    def _detokenize(
        self, state: list[Any] | None, prompt: list[int], ids: list[int], skips: bool, ends: bool
    ) -> dict[str, Any]:
        def decode(token_ids: Sequence[int]) -> str:
            return self.decode(token_ids, skips)

        detokenizer = IncrementalDetokenizer(decode, prompt)
        if state is not None:
            detokenizer.state = state
        pieces = [detokenizer.push(token_id) for token_id in ids]
        if ends:
            pieces.append(detokenizer.finish())
        return {"pieces": pieces, "state": detokenizer.state}


def _added_token(value: Any, where: str) -> AddedToken:
    """A token as the files write it: a string, or an object with "content"."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        chosen = {name: value[name] for name in flags if isinstance(value.get(name), bool)}
        return AddedToken(value["content"], **chosen)
    raise TextError("failed", f'{where}: expected a token or an object with "content"')


def _add_tokens(tokenizer: Tokenizer, config: dict[str, Any], folder: str) -> dict[str, str]:
    """Adds the tokens that the side files name, in transformers' order.

    Returns: the named special tokens ("bos_token" and so on), for the chat template.
    """
    fields = dict(config)
    listed: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in fields:
        entries = fields["added_tokens_decoder"]
        if not isinstance(entries, dict) or not all(key.isdecimal() for key in entries):
            raise TextError("failed", "added_tokens_decoder: expected tokens by their ids")
        listed = {int(key): _added_token(value, key) for key, value in entries.items()}
    else:
        fields |= read_json(os.path.join(folder, "special_tokens_map.json"))
        listed = _legacy_tokens(tokenizer, fields, folder)
    by_content = {token.content: token for token in listed.values()}
    extra = fields.get("extra_special_tokens")
    if isinstance(extra, dict):  # named ones of this model
        fields |= extra
        extra = None
    extra = extra or fields.get("additional_special_tokens") or []
    named = {
        name: _added_token(value, name)
        for name, value in fields.items()
        if (name in _NAMED_TOKENS and value is not None)
        or (name.endswith("_token") and isinstance(value, (str, dict)))
    }
    named = {name: by_content.get(token.content, token) for name, token in named.items()}
    tokens = [token for _, token in sorted(listed.items())]
    known = {token.content for token in tokens}
    known |= {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    more = [*named.values(), *(_added_token(value, "extra_special_tokens") for value in extra)]
    tokens += [token for token in more if token.content not in known]
    names = {token.content for token in named.values()}
    for token in tokens:
        token.special = token.special or token.content in names
    tokenizer.add_tokens(tokens)
    return {name: token.content for name, token in named.items()}


def _legacy_tokens(
    tokenizer: Tokenizer, fields: dict[str, Any], folder: str
) -> dict[int, AddedToken]:
    """The added tokens of added_tokens.json and of tokenizer.json itself, by id."""
    special = {_content(fields.get(name)) for name in _NAMED_TOKENS}
    special |= {_content(value) for value in _values(fields.get("additional_special_tokens"))}
    listed = {}
    for content, token_id in read_json(os.path.join(folder, "added_tokens.json")).items():
        if not isinstance(token_id, int):
            raise TextError("failed", f"added_tokens.json: {content!r}: expected an id")
        is_special = content in special
        listed[token_id] = AddedToken(content, normalized=not is_special, special=is_special)
    return listed | tokenizer.get_added_tokens_decoder()


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _values(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else ()


def _convert(folder: str) -> tuple[Tokenizer, dict[str, str]]:
    """A tokenizer that transformers makes of a folder's other files, without torch."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # as if it were not installed
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(
        folder, use_fast=True, trust_remote_code=False, local_files_only=True
    )
    if not getattr(made, "is_fast", False):
        raise TextError("failed", "has no fast form; expected a tokenizer.json")
    return made.backend_tokenizer, made.special_tokens_map
