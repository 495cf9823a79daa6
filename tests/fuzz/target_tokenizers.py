"""Tokenizer files: a whole one damaged, or one made by a grammar of every component there is.

A tokenizer either gives ids of the model's vocabulary and text, or is refused by name, within
bounds of time and memory; regular expressions and normalizers of a folder are a stranger's program.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from json_mutations import apply, mutate
from judge import Nonsense
from models import SMALL, VOCAB_SIZE, write_model
from supervisor import TEXT_LIMITS
from tidaldecode import Decoder

LIMITS = TEXT_LIMITS
_REGEXES = (
    "a", "", ".*", "(a+)+$", "(a|a)*$", "(a|aa)+$", "(.*a){25}", "(?=a)", "[", "(", "\\p{L}+",
    "\\s", "(?<=a{1,1000})b", "((a{1,100}){1,100}){1,100}", "(?:)", "^", "$", "\\b", "(?i)é",
    "(\\w+\\s?)+$", "(?<!\\S)a", "\\Ka", "(?P<n>a)(?P=n)", "\\1", "a{1000000}", "(?R)",
    "\\x{110000}", "[\\d\\D]",
)  # fmt: skip
_IDS = (0, 1, 5, 319, 320, 321, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, -1)
_TEXTS = (
    "hello", "a" * 30 + "b", "a" * 2000, "é世🎉", " ", "\x00", "a\u0301" * 50, "evil t0 t1",
    "<s></s>", "\ufdfa" * 20, "\u200d" * 40, "A B  C\n\n\t", "x" * 20_000, "[PAD] [UNK] [CLS]",
    "\r\n\u2028",
)  # fmt: skip
_BEHAVIORS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
_SCHEMES = ("always", "never", "first")


def prepare(workspace: Path) -> None:
    """Writes the whole folder."""
    write_model(workspace / "model")


@functools.lru_cache(maxsize=1)
def _documents() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name))
        files = ("tokenizer.json", "tokenizer_config.json")
        return {file: json.loads((folder / file).read_text()) for file in files}


def make_case(rng: random.Random) -> dict[str, Any]:
    """{"mutations"} of the whole tokenizer or {"tokenizer"} made anew; and "text", "ids"."""
    case: dict[str, Any] = {
        "text": rng.choice(_TEXTS),
        "ids": [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(6))],
    }
    if rng.random() < 0.4:
        count = rng.randint(1, 2)
        return case | {"mutations": [mutate(rng, _documents()) for _ in range(count)]}
    return case | {"tokenizer": _tokenizer(rng), "mutations": []}


def _tokenizer(rng: random.Random) -> dict[str, Any]:
    def maybe(make: Any) -> Any:
        return make(rng, 2) if rng.random() < 0.5 else None

    return {
        "version": "1.0",
        "truncation": maybe(_truncation),
        "padding": maybe(_padding),
        "added_tokens": [_added(rng) for _ in range(rng.choice((0, 0, 1, 3)))],
        "normalizer": maybe(_normalizer),
        "pre_tokenizer": maybe(_pre_tokenizer),
        "post_processor": maybe(_post_processor),
        "decoder": maybe(_decoder),
        "model": _model(rng),
    }


def _pattern(rng: random.Random) -> dict[str, str]:
    kind = rng.choice(("Regex", "String"))
    return {kind: rng.choice(_REGEXES) if kind == "Regex" else rng.choice(("", "a", " ", "é"))}


def _added(rng: random.Random) -> dict[str, Any]:
    flags = {name: rng.random() < 0.4 for name in ("single_word", "lstrip", "rstrip", "normalized")}
    content = rng.choice(("", "a", "<s>", "</s>", " ", "evil", "\x00", "é", "x" * 500))
    return {"id": rng.choice(_IDS[:-1]), "content": content, "special": rng.random() < 0.5} | flags


def _truncation(rng: random.Random, depth: int) -> dict[str, Any]:
    return {
        "direction": rng.choice(("Left", "Right")),
        "max_length": rng.choice((0, 1, 5, 2**32, 2**63)),
        "strategy": rng.choice(("LongestFirst", "OnlyFirst", "OnlySecond")),
        "stride": rng.choice((0, 1, 5, 6, 2**40)),
    }


def _padding(rng: random.Random, depth: int) -> dict[str, Any]:
    length = rng.choice((0, 8, 100, 10**6, 10**9, 2**62))
    return {
        "strategy": rng.choice(("BatchLongest", {"Fixed": length})),
        "direction": rng.choice(("Left", "Right")),
        "pad_to_multiple_of": rng.choice((None, 0, 1, 8, 10**9, 2**62)),
        "pad_id": rng.choice(_IDS[:-1]),
        "pad_type_id": 0,
        "pad_token": rng.choice(("[PAD]", "", "t0")),
    }


def _normalizer(rng: random.Random, depth: int) -> dict[str, Any]:
    amplify = {"type": "Replace", "pattern": {"Regex": "."}, "content": "aa" * rng.choice((1, 500))}
    choices: list[dict[str, Any]] = [
        {"type": rng.choice(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Nmt", "StripAccents"))},
        {"type": "Replace", "pattern": _pattern(rng), "content": rng.choice(("", "a", "b" * 9999))},
        {"type": "Prepend", "prepend": rng.choice(("", "\u2581", "x" * 10_000))},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
         "strip_accents": None, "lowercase": True},
        {"type": "Precompiled", "precompiled_charsmap": rng.choice(("", "AAAA", "/////w=="))},
        {"type": "Sequence", "normalizers": [amplify] * rng.choice((1, 5, 40))},
        {"type": "ByteLevel"},
        {"type": "NoSuchNormalizer"},
    ]  # fmt: skip
    if depth > 0:
        parts = [_normalizer(rng, depth - 1) for _ in range(rng.randint(0, 3))]
        choices.append({"type": "Sequence", "normalizers": parts})
    return rng.choice(choices)


def _pre_tokenizer(rng: random.Random, depth: int) -> dict[str, Any]:
    prefix, scheme = rng.random() < 0.5, rng.choice(_SCHEMES)
    choices: list[dict[str, Any]] = [
        {"type": rng.choice(("WhitespaceSplit", "Whitespace", "BertPreTokenizer"))},
        {"type": "UnicodeScripts"},
        {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True,
         "use_regex": prefix},
        {"type": "Metaspace", "replacement": rng.choice(("\u2581", "", "ab", "a")),
         "prepend_scheme": scheme, "split": prefix},
        {"type": "Split", "pattern": _pattern(rng), "behavior": rng.choice(_BEHAVIORS),
         "invert": prefix},
        {"type": "Punctuation", "behavior": rng.choice(_BEHAVIORS)},
        {"type": "Digits", "individual_digits": prefix},
        {"type": "CharDelimiterSplit", "delimiter": rng.choice(("a", "", "ab"))},
        {"type": "FixedLength", "length": rng.choice((0, 1, 5, 2**63))},
    ]  # fmt: skip
    if depth > 0:
        parts = [_pre_tokenizer(rng, depth - 1) for _ in range(rng.randint(0, 3))]
        choices.append({"type": "Sequence", "pretokenizers": parts})
    return rng.choice(choices)


def _post_processor(rng: random.Random, depth: int) -> dict[str, Any]:
    special = {"SpecialToken": {"id": rng.choice(("<s>", "t0")), "type_id": 0}}
    sequence = {"Sequence": {"id": rng.choice("AB"), "type_id": rng.choice((0, 2**31))}}
    choices: list[dict[str, Any]] = [
        {"type": "TemplateProcessing",
         "single": [special] * rng.choice((0, 1, 10_000)) + [sequence] * rng.choice((0, 1, 3)),
         "pair": [sequence],
         "special_tokens": {"<s>": {"id": "<s>", "ids": [rng.choice(_IDS[:-2])] * 2,
                                    "tokens": ["<s>"] * rng.choice((1, 2))}}},
        {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", rng.choice(_IDS)]},
        {"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 2], "trim_offsets": True,
         "add_prefix_space": True},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    ]  # fmt: skip
    if depth > 0:
        parts = [_post_processor(rng, depth - 1) for _ in range(rng.randint(0, 3))]
        choices.append({"type": "Sequence", "processors": parts})
    return rng.choice(choices)


def _decoder(rng: random.Random, depth: int) -> dict[str, Any]:
    choices: list[dict[str, Any]] = [
        {"type": rng.choice(("ByteLevel", "ByteFallback", "Fuse", "NoSuchDecoder"))},
        {"type": "WordPiece", "prefix": rng.choice(("##", "")), "cleanup": True},
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
        {"type": "BPEDecoder", "suffix": rng.choice(("", "</w>"))},
        {"type": "Replace", "pattern": _pattern(rng), "content": rng.choice(("", "a" * 100_000))},
        {"type": "Strip", "content": rng.choice((" ", "a")), "start": rng.choice((0, 2**63)),
         "stop": rng.choice((0, 1, 2**63))},
    ]  # fmt: skip
    if depth > 0:
        parts = [_decoder(rng, depth - 1) for _ in range(rng.randint(0, 3))]
        choices.append({"type": "Sequence", "decoders": parts})
    return rng.choice(choices)


def _model(rng: random.Random) -> dict[str, Any]:
    words = [
        "t0",
        "evil",
        "a",
        "b",
        "aa",
        "hello",
        "<unk>",
        "",
        " ",
        "é",
        "\u2581",
        "##a",
        "x" * 99,
    ]
    rng.shuffle(words)
    ids = [*range(12), rng.choice(_IDS)]
    vocab = dict(zip(words, ids, strict=True))
    unknown = rng.choice(("<unk>", "t0", "no such token", None))
    choices: list[dict[str, Any]] = [
        {"type": "WordLevel", "vocab": vocab, "unk_token": unknown or "t0"},
        {"type": "WordPiece", "vocab": vocab, "unk_token": unknown or "t0",
         "continuing_subword_prefix": rng.choice(("##", "")),
         "max_input_chars_per_word": rng.choice((0, 100, 2**63))},
        {"type": "Unigram", "unk_id": rng.choice((None, 0, 5, 2**40)),
         "byte_fallback": rng.random() < 0.5,
         "vocab": [[word, rng.choice((0.0, -1.0, 1e308, -1e308))] for word in words]},
        {"type": "BPE", "vocab": vocab, "merges": rng.choice(([], [["a", "a"]], ["a a", "b"])),
         "dropout": rng.choice((None, 0.0, 0.5, 1.0, 2.0)), "unk_token": unknown,
         "continuing_subword_prefix": rng.choice((None, "", "##")),
         "end_of_word_suffix": rng.choice((None, "</w>")), "fuse_unk": rng.random() < 0.5,
         "byte_fallback": rng.random() < 0.5, "ignore_merges": rng.random() < 0.5},
    ]  # fmt: skip
    return rng.choice(choices)


def describe(case: dict[str, Any]) -> str:
    """The case for a reader."""
    parts = {k: v for k, v in case.get("tokenizer", {}).items() if v not in (None, [], "1.0")}
    made = json.dumps(parts or case["mutations"])
    return f"tokenizer.json: {made}, text {case['text'][:40]!r}, ids {case['ids']}"


def group(case: dict[str, Any]) -> str:
    """What a fault of this case is filed under."""
    return "tokenizer"


def smaller(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The case with one component or mutation less."""
    mutations = case["mutations"]
    for index in range(len(mutations) if len(mutations) > 1 else 0):
        yield {**case, "mutations": mutations[:index] + mutations[index + 1 :]}
    tokenizer = case.get("tokenizer", {})
    for name, value in tokenizer.items():
        if value and name not in ("version", "model"):
            nothing: Any = [] if isinstance(value, list) else None
            yield {**case, "tokenizer": {**tokenizer, name: nothing}}


def run_case(case: dict[str, Any], workspace: Path) -> None:
    """Text to ids, ids to text, and a stream of text."""
    with tempfile.TemporaryDirectory(dir=workspace) as name:
        folder = Path(name) / "model"
        shutil.copytree(workspace / "model", folder)
        if "tokenizer" in case:
            text = json.dumps(case["tokenizer"])
            (folder / "tokenizer.json").write_text(text)
            (folder / "tokenizer_config.json").write_text(
                '{"tokenizer_class": "PreTrainedTokenizerFast"}'
            )
        for mutation in case["mutations"]:
            apply(folder, mutation)
        with Decoder(folder, **SMALL) as decoder:
            _use(decoder, case)


def _use(decoder: Decoder, case: dict[str, Any]) -> None:
    ids = decoder.encode(case["text"])
    if not all(type(token_id) is int for token_id in ids):
        raise Nonsense("token ids that are no integers")
    text = decoder.decode(case["ids"])
    if not isinstance(text, str):
        raise Nonsense("text that is no string")
    with decoder.stream([1, 2, 3], max_new_tokens=4, stop="zz") as stream:
        pieces = "".join(stream)
        if stream.result is None or stream.result.text != pieces:
            raise Nonsense("the pieces of a stream are not its text")
    decoder.generate(case["text"][:40], max_new_tokens=2)
