"""A model folder that writes a known text, for tests of everything between tokens and text.

Its tokenizer has one token per byte. Its layers add nothing, so the next token depends on the last
one alone: every byte of the script is followed by the next. Bytes of a script must differ.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiny_models import TinyModel, random_weights, write_checkpoint

BOS, EOS = 256, 257
VOCAB_SIZE = 320
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
# Characters of one to four bytes; no byte occurs twice.
SCRIPT = "aé世🎉bcd. STOP"


def write_scripted_model(
    folder: Path, script: str = SCRIPT, start: str = ">", **config: Any
) -> Path:
    """A folder whose model continues `start` with `script` and then ends.

    Args:
        config: fields of config.json to add or replace.
    """
    model = TinyModel(vocab_size=VOCAB_SIZE, num_layers=3, eos_token_id=EOS)
    weights = random_weights(model)
    for name, value in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            value[:] = 0.0
    chain = [*start.encode(), *script.encode(), EOS]
    assert len(set(chain)) == len(chain), "a byte occurs twice"
    embedding = weights["model.embed_tokens.weight"]
    weights["model.norm.weight"][:] = 1.0
    head = np.zeros_like(embedding)
    for token, following in zip(chain, chain[1:], strict=False):
        head[following] = 4.0 * embedding[token]
    weights["lm_head.weight"] = head
    write_checkpoint(folder, model, weights)
    update_json(folder / "config.json", **config)
    return write_byte_tokenizer(folder)


def update_json(path: Path, **fields: Any) -> None:
    """Adds or replaces fields of a JSON file."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | fields))


def byte_letters() -> list[str]:
    """The character that stands for each byte in byte-level tokenizers (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, spare = [], 256
    for byte in range(256):
        letters.append(chr(byte if byte in shown else spare))
        spare += byte not in shown
    return letters


def write_byte_tokenizer(
    folder: Path, chat_template: str | None = CHAT_TEMPLATE, vocab_size: int = 258
) -> Path:
    """A byte-level tokenizer without merges: ids 0-255 are bytes, 256 is BOS, 257 ends a text."""
    vocab = {letter: byte for byte, letter in enumerate(byte_letters())}
    special = {"<s>": BOS, "</s>": EOS} | {f"<x{i}>": i for i in range(258, vocab_size)}
    pair = {"type_id": 0}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True} for name, i in special.items()
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                    "use_regex": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>"} | pair}, {"Sequence": {"id": "A"} | pair}],
            "pair": [{"Sequence": {"id": "A"} | pair}, {"Sequence": {"id": "B"} | pair}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def name_special_tokens(folder: Path, names: Sequence[str]) -> None:
    """Gives the further special tokens of a write_byte_tokenizer(), from 258 on, these names."""
    path = folder / "tokenizer.json"
    text = path.read_text()
    for index, name in enumerate(names, 258):
        text = text.replace(f"<x{index}>", name)
    path.write_text(text)
