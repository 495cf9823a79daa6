"""Log-probabilities as OpenAI's two routes and vLLM's extra field write them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from tidaldecode.results import TokenLogprobs
from tidaldecode.text.tokenizer import Tokenizer

# JSON has no infinity: what a token gets whose probability is zero.
LEAST = -9999.0


class TokenNames:
    """What clients are shown of single tokens."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Takes the tokenizer of the model; without one tokens are shown by their ids."""
        self._tokenizer = tokenizer

    def learn(self, logprobs: Sequence[TokenLogprobs]) -> None:
        """Asks for all tokens at once that will be named."""
        if self._tokenizer is not None:
            ids = [each.token_id for each in logprobs]
            self._tokenizer.token_bytes(ids + [i for each in logprobs for i, _ in each.top])

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes it stands for."""
        if self._tokenizer is None:
            return f"token_id:{token_id}".encode()
        return self._tokenizer.token_bytes([token_id])[0]

    def is_hidden(self, token_id: int) -> bool:
        """Whether it is a special token, which texts leave out."""
        return self._tokenizer is not None and not self._tokenizer.shown_bytes([token_id])[0]

    def text_of(self, token_id: int) -> str:
        """Its text; bytes that are no characters are written as OpenAI writes them."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(logprobs: Sequence[TokenLogprobs], names: TokenNames) -> dict[str, Any]:
    """Those of new tokens, as chats have them."""
    names.learn(logprobs)

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": names.text_of(token_id),
            "logprob": max(logprob, LEAST),
            "bytes": list(names.bytes_of(token_id)),
        }

    content = [
        entry(each.token_id, each.logprob)
        | {"top_logprobs": [entry(token_id, logprob) for token_id, logprob in each.top]}
        for each in logprobs
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Those of a completion's tokens, one list a field, and where in the text each token begins."""

    def __init__(self, names: TokenNames, *, skips: bool) -> None:
        """Begins a text; skips: special tokens are left out of it."""
        self._names = names
        self._skips = skips
        self._offset = 0  # characters before the next token
        self._rest = b""  # of the last tokens, the beginning of a character

    def prompt(self, text: str, first: int, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The tokens of an echoed prompt with this text: nothing is before the first one that could
        foretell it."""
        self._names.learn(logprobs)
        rows = [(first, None, None), *map(self._row, logprobs)]
        fields = self._fields(rows, text)
        self._offset, self._rest = len(text), b""
        return fields

    def of(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The next tokens."""
        self._names.learn(logprobs)
        return self._fields([self._row(each) for each in logprobs])

    def _row(self, each: TokenLogprobs) -> tuple[int, float | None, dict[str, float] | None]:
        name = self._names.text_of
        # Two ids may have the same text: the likelier one, which comes first, keeps the place.
        top: dict[str, float] = {}
        for token_id, logprob in each.top:
            top.setdefault(name(token_id), max(logprob, LEAST))
        top.setdefault(name(each.token_id), max(each.logprob, LEAST))
        return each.token_id, max(each.logprob, LEAST), top

    def _fields(
        self, rows: Sequence[tuple[int, float | None, Any]], prompt: str | None = None
    ) -> dict[str, Any]:
        offsets = []
        for token_id, _, _ in rows:
            offsets.append(self._offset)
            self._pass(token_id, prompt)
        return {
            "tokens": [self._names.text_of(token_id) for token_id, _, _ in rows],
            "token_logprobs": [logprob for _, logprob, _ in rows],
            "top_logprobs": [top for _, _, top in rows],
            "text_offset": offsets,
        }

    def _pass(self, token_id: int, prompt: str | None) -> None:
        """Goes on behind a token; of a prompt, whose text may show special tokens or not."""
        raw = self._names.bytes_of(token_id)
        if self._names.is_hidden(token_id):
            is_shown = not self._skips
            if prompt is not None:
                is_shown = prompt.startswith(raw.decode(errors="replace"), self._offset)
            raw = raw if is_shown else b""
        data = self._rest + raw
        text, num_used = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[num_used:]
        self._offset += len(text)


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fields of several parts of a completion, one behind the other."""
    return {name: [item for part in parts for item in part[name]] for name in parts[0]}


def prompt_logprobs(logprobs: Sequence[TokenLogprobs], names: TokenNames) -> list[Any]:
    """Those of a prompt's tokens as vLLM writes them: None for the first, then one dict a token."""
    names.learn(logprobs)

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {
            "logprob": max(logprob, LEAST),
            "rank": rank,
            "decoded_token": names.text_of(token_id),
        }

    rows: list[Any] = [None]
    for each in logprobs:
        row = {
            str(token_id): entry(token_id, logprob, rank)
            for rank, (token_id, logprob) in enumerate(each.top, 1)
        }
        row.setdefault(str(each.token_id), entry(each.token_id, each.logprob, each.rank))
        rows.append(row)
    return rows
