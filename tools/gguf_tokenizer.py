"""The tokenizer files of a Hugging Face folder, from the metadata of a GGUF file.

Used by gguf_folder.py. Two kinds, as the public models have them: byte-level BPE with its merges
("gpt2"), and sentencepiece BPE ("llama"), whose merges follow from the scores of its tokens.
"""

from __future__ import annotations

from typing import Any

from gguf_file import GgufError

# tokenizer.ggml.token_type
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = "▁"  # how sentencepiece writes a space
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

Json = dict[str, Any]


class GgufTokenizer:
    """The tokenizer of a GGUF file, ready to be written."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        """Raises: GgufError for a kind that is not known here."""
        prefix = "tokenizer.ggml."
        self._fields = {
            k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)
        }
        self._chat_template = metadata.get("tokenizer.chat_template")
        self._types: list[int] = self._field("token_type")
        self._tokens: list[str] = self._field("tokens")
        if self._field("model") == "llama":
            # Runs of spaces that the makers defined are stored with spaces, all others are not.
            self._tokens = [token.replace(" ", _SPACE) for token in self._tokens]

    @property
    def num_tokens(self) -> int:
        """Tokens, the unused ones included."""
        return len(self._tokens)

    def special_id(self, name: str) -> int | None:
        """Id of "bos", "eos", "unk" or "pad"."""
        return self._fields.get(f"{_SPECIAL_TOKENS[name]}_token_id")

    def tokenizer_json(self) -> Json:
        """tokenizer.json."""
        kind = self._field("model")
        if kind == "gpt2":
            return self._tokenizer_json(self._byte_level())
        if kind == "llama":
            return self._tokenizer_json(self._sentencepiece())
        raise GgufError(f"tokenizer.ggml.model: got {kind!r}, expected gpt2 or llama")

    def special_tokens_map(self) -> Json:
        """special_tokens_map.json."""
        ids = {name: self.special_id(name) for name in _SPECIAL_TOKENS}
        return {f"{name}_token": self._tokens[i] for name, i in ids.items() if i is not None}

    def tokenizer_config(self, max_length: int) -> Json:
        """tokenizer_config.json; max_length: positions of the model."""
        special = [t for t in self._added_tokens() if t["special"]]
        config = self.special_tokens_map() | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {str(t["id"]): _without_id(t) for t in special},
        }
        if self._chat_template is not None:
            config["chat_template"] = self._chat_template
        return config

    def _field(self, name: str) -> Any:
        if name not in self._fields:
            raise GgufError(f"tokenizer.ggml.{name}: it is missing")
        return self._fields[name]

    def _vocab(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self._tokens)}

    def _added_tokens(self) -> list[Json]:
        rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": i, "content": token, **rules, "special": kind == _CONTROL}
            for i, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True))
            if kind in (_CONTROL, _USER_DEFINED)
        ]

    def _tokenizer_json(self, parts: Json) -> Json:
        if self._fields.get("add_eos_token", False):
            raise GgufError("tokenizer.ggml.add_eos_token: got True, expected False")
        start = self._start() if self._fields.get("add_bos_token", False) else None
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added_tokens(),
            "post_processor": start,
        } | parts

    def _start(self) -> Json:
        """Puts the begin-of-text token in front."""
        bos = self._field("bos_token_id")
        token = {"SpecialToken": {"id": self._tokens[bos], "type_id": 0}}
        first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
        special = {"id": self._tokens[bos], "ids": [bos], "tokens": [self._tokens[bos]]}
        return {
            "type": "TemplateProcessing",
            "single": [token, first],
            "pair": [token, first, token, second],
            "special_tokens": {self._tokens[bos]: special},
        }

    def _byte_level(self) -> Json:
        words = _BYTE_LEVEL | {"use_regex": True}
        pre = self._field("pre")
        if pre == "smollm":  # digits one by one, then the words of GPT-2
            digits = {"type": "Digits", "individual_digits": True}
            words = {"type": "Sequence", "pretokenizers": [digits, words]}
        elif pre not in ("gpt-2", "default"):
            raise GgufError(f"tokenizer.ggml.pre: got {pre!r}, expected smollm, gpt-2 or default")
        return {
            "normalizer": None,
            "pre_tokenizer": words,
            "decoder": _BYTE_LEVEL | {"use_regex": True},
            "model": _bpe(self._vocab(), self._field("merges")),
        }

    def _sentencepiece(self) -> Json:
        """Spaces are tokens' first characters, and what no token holds is written as bytes."""
        if self._fields.get("add_space_prefix", True):
            raise GgufError("tokenizer.ggml.add_space_prefix: got True, expected False")
        space, sign = {"String": " "}, {"String": _SPACE}
        model = _bpe(self._vocab(), self._merges())
        model |= {
            "unk_token": self._tokens[self._field("unknown_token_id")],
            "fuse_unk": True,
            "byte_fallback": True,
        }
        spaces = {"type": "Replace", "pattern": sign, "content": " "}
        return {
            "normalizer": {"type": "Replace", "pattern": space, "content": _SPACE},
            "pre_tokenizer": {
                "type": "Split", "pattern": space, "behavior": "MergedWithPrevious", "invert": False
            },
            "decoder": {
                "type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]
            },
            "model": model,
        }  # fmt: skip

    def _merges(self) -> list[list[str]]:
        """Every split of a token into two tokens, those of the best token first.

        Sentencepiece merges what gives the token of the highest score. What the makers of the
        model defined themselves (runs of spaces, line breaks) has no score and is joined before
        all else, short runs first.
        """
        vocab = self._vocab()
        scores = self._field("scores")
        ranked = []
        for token, i in vocab.items():
            if self._types[i] not in (_NORMAL, _USER_DEFINED):
                continue
            is_own = self._types[i] == _USER_DEFINED
            rank = (0, len(token)) if is_own else (1, -scores[i])
            splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            known = [(a, b) for a, b in splits if a in vocab and b in vocab]
            known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
            ranked += [(rank, [a, b]) for a, b in known]
        ranked.sort(key=lambda entry: entry[0])
        return [pair for _, pair in ranked]


def _bpe(vocab: dict[str, int], merges: list[Any]) -> Json:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": False, "vocab": vocab, "merges": merges,
    }  # fmt: skip


def _without_id(token: Json) -> Json:
    return {key: value for key, value in token.items() if key != "id"}
