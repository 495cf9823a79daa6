"""Folders with tokenizers of every kind that models come with, small, for tests of text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as pre

CORPUS = [
    "The sky over the harbour was grey, and 1234 gulls cried. They didn't stop!",
    "Configuration files are read from /etc/app.conf; it's 5.0 by default, isn't it?",
    "Größe, naïve café, 世界 and 🎉: déjà vu.",
    "def main(argument):\n\treturn {'key': [1, 2, 3]}\n\n\nif __name__ == '__main__':\n    main()",
] * 4
TEXTS = [
    "",
    " ",
    "The sky over the harbour",
    "  two spaces in front and behind  ",
    "line\n\nbreaks\r\n\tand tabs",
    "Größe 世界 🎉 é ﬁ ① ｆｕｌｌ",
    "it's , isn't it ? Yes . No !",
    "<s>special</s> in <|im_start|>the<|im_end|> middle </s>",
    "<s> spaces around </s> special <extra> tokens",
    "\u00a0\u200b\ufeff odd spaces\x00",
    "9999999 3.14159 -12",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPIECE_DECODER = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]


def _train(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _bos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def _byte_level(add_prefix_space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    return _train(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )


def _llama3() -> Tokenizer:
    tokenizer = _byte_level()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(_LLAMA3), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _bos(tokenizer)


def _pieces(parts: dict[str, Any]) -> Tokenizer:
    """A BPE of SentencePiece's kind, with bytes to fall back to."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*SPECIAL, *bytes_], show_progress=False
    )
    trained = json.loads(_train(tokenizer, trainer).to_str())
    # The bytes are pieces of the model, no added tokens.
    trained["added_tokens"] = trained["added_tokens"][: len(SPECIAL)]
    return _bos(Tokenizer.from_str(json.dumps(trained)))


def _llama2() -> Tokenizer:
    return _pieces(
        {
            "normalizer": normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            ),
            "decoder": decoders.Sequence(_SPIECE_DECODER),
        }
    )


def _mistral() -> Tokenizer:
    return _pieces(
        {
            "pre_tokenizer": pre.Metaspace(prepend_scheme="first", split=False),
            "decoder": decoders.Sequence(_SPIECE_DECODER),
        }
    )


def _gemma() -> Tokenizer:
    return _pieces(
        {
            "normalizer": normalizers.Replace(" ", "▁"),
            "pre_tokenizer": pre.Split(" ", "merged_with_previous"),
            "decoder": decoders.Sequence(_SPIECE_DECODER[:3]),
        }
    )


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    return _bos(_train(tokenizer, trainer))


def _word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre.Whitespace()
    return _train(tokenizer, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    return _train(tokenizer, trainer)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": _byte_level,
    "byte_level_prefix": lambda: _byte_level(add_prefix_space=True),
    "llama3": _llama3,
    "llama2": _llama2,
    "mistral": _mistral,
    "gemma": _gemma,
    "unigram": _unigram,
    "word_level": _word_level,
    "word_piece": _word_piece,
}


def write_tokenizer(folder: Path, kind: str, **config: Any) -> Path:
    """tokenizer.json of a kind, and tokenizer_config.json of these fields over the usual ones."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = KINDS[kind]()
    tokenizer.add_tokens([AddedToken("<extra>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"} | config
    kept = {name: value for name, value in fields.items() if value is not ...}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return folder
