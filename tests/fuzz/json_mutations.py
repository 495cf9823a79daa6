"""Damage to files, described by values: what a case holds, and what a worker applies to a folder.

A mutation is {"file": name, "do": kind, ...}. JSON is changed by its structure (set, delete,
duplicate a key) or as bytes; of a safetensors file the header is JSON too.
"""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

# JSON as text, since some of it no parser gives back: 1e400, NaN, a million brackets.
_SCALARS = (
    "null", "true", "false", "0", "1", "-1", "2", "3", "0.5", "-0.0", "1e-320", "1e308", "1e400",
    "-1e400", "NaN", "Infinity", "2147483647", "2147483648", "4294967295", "4294967296",
    "9223372036854775807", "9223372036854775808", "18446744073709551616", "1" + "0" * 400,
    "1" + "0" * 5000, '""', '"a"', '"0"', '"auto"', '"\\ud800"', '"\\u0000"', '"../../etc/passwd"',
    '"/dev/zero"', '"\\u001b[31m\\n"', '"' + "a" * 100_000 + '"', '"default"', '"yarn"',
    '"longrope"', '"dynamic"', '"llama3"', '"float16"', '"bfloat16"', '"torch.float32"', '"F16"',
    '"BF16"', '"F8_E4M3"', '"llama"', '"qwen3"', '"gemma3_text"', '"silu"', '"gelu"',
)  # fmt: skip
_CONTAINERS = (
    "[]", "{}", "[null]", "[[]]", "[1, 2]", "[0, 0]", "[-1, 4]", "[1e400]", "[[1, 2], [3]]",
    '["a"]', '{"a": 1}', '{"a": 1, "a": 2}', "[" * 500 + "]" * 500, "[" * 100_000 + "]" * 100_000,
    '{"a":' * 2000 + "1" + "}" * 2000, "[" + "0," * 50_000 + "0]", "[9007199254740993, 1]",
    "[4294967296, 4294967296]", "[0, 18446744073709551615]", "[9223372036854775807, 2]",
    '{"rope_type": "yarn", "factor": 0}', '{"quant_method": "fp8"}',
)  # fmt: skip
VALUES = (*_SCALARS, *_CONTAINERS)
# Keys that some version of the libraries around gives a meaning.
KEYS = (
    "rope_scaling", "rope_parameters", "rope_theta", "quantization_config", "sliding_window",
    "use_sliding_window", "layer_types", "auto_map", "head_dim", "torch_dtype", "dtype",
    "max_length", "min_length", "no_repeat_ngram_size", "suppress_tokens", "bad_words_ids",
    "num_beams", "eos_token_id", "pad_token_id", "partial_rotary_factor", "attention_bias",
    "mlp_bias", "tie_word_embeddings", "num_key_value_heads", "architectures", "text_config",
    "fingerprint", "scores", "select_layers", "scored_layers", "full_layers", "__metadata__",
    "weight_map", "", "__class__", "transformers_version", "attn_logit_softcapping",
    "pretraining_tp",
)  # fmt: skip
BYTES = (
    "", " ", "\x00" * 64, "null", "[]", "{}", "{", '"', "\ufeff{}", "<!DOCTYPE html><html>",
    "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "PK\x03\x04", "\x1f\x8b",
    "GGUF", "\x80\x04.", "\xff\xfe{\x00}\x00", "{}" * 1000, "nul", "\xff" * 16, "\x00" * 7,
)  # fmt: skip
_FILE_KINDS = (
    "missing", "fifo", "directory", "link to itself", "link to nothing", "link to /dev/zero",
    "link to /dev/null", "sparse",
)  # fmt: skip
_MARK = "@@tidal-fuzz@@"
_MOST_BYTES = 64 << 20  # of a file that is changed once more


def mutate(rng: random.Random, files: dict[str, Any]) -> dict[str, Any]:
    """A mutation of one of `files`: {name: its JSON, a safetensors file's header, or None}."""
    file = rng.choice(sorted(files))
    document = files[file]
    draw = rng.random()
    if draw < 0.06:
        return {"file": file, "do": "kind", "kind": rng.choice(_FILE_KINDS)}
    if draw < 0.12 or document is None:
        return {"file": file, "do": "bytes", "text": rng.choice(BYTES)}
    if draw < 0.17:
        return {"file": file, "do": "cut", "share": round(rng.random(), 3)}
    if draw < 0.25:
        return {
            "file": file,
            "do": "flip",
            "share": round(rng.random(), 4),
            "bit": rng.randrange(8),
        }
    if draw < 0.29 and file.endswith(".safetensors"):
        length = rng.choice((0, 1, 7, 8, 100, 2**24, 2**31, 2**63, 2**64 - 1))
        return {"file": file, "do": "header length", "length": length}
    if draw < 0.31 and file.endswith(".safetensors"):
        return {"file": file, "do": "extra entries", "count": rng.choice((1, 1000, 1_500_000))}
    path = _some_path(rng, document)
    if draw < 0.4:
        return {"file": file, "do": rng.choice(("delete", "duplicate")), "path": path}
    if draw < 0.55 and isinstance(_at(document, path[:-1]), dict):
        path = [*path[:-1], rng.choice(KEYS)]
    return {"file": file, "do": "set", "path": path, "json": _some_value(rng, document, path)}


def _some_path(rng: random.Random, document: Any) -> list[Any]:
    path: list[Any] = []
    node = document
    while isinstance(node, (dict, list)) and node:
        key = rng.choice(sorted(node)) if isinstance(node, dict) else rng.randrange(len(node))
        path.append(key)
        node = node[key]
        if rng.random() < 0.3:
            break
    return path


def _at(document: Any, path: list[Any]) -> Any:
    for key in path:
        document = document[key]
    return document


def _some_value(rng: random.Random, document: Any, path: list[Any]) -> str:
    try:
        old = _at(document, path)
    except (KeyError, IndexError, TypeError):
        old = None
    if isinstance(old, int) and not isinstance(old, bool) and rng.random() < 0.4:
        return str(rng.choice((old + 1, old - 1, -old, 2 * old, old // 2, old * 1000)))
    return rng.choice(VALUES)


def apply(folder: Path, mutation: dict[str, Any]) -> None:
    """Changes a file of a folder; one that is not there any more stays so."""
    path = folder / mutation["file"]
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return
    do = mutation["do"]
    if do == "kind":
        _change_kind(path, mutation["kind"])
    elif do == "bytes":
        path.write_bytes(mutation["text"].encode("latin-1", "xmlcharrefreplace"))
    elif do == "cut":
        os.truncate(path, int(path.stat().st_size * mutation["share"]))
    elif do == "flip":
        _flip(path, mutation["share"], mutation["bit"])
    elif do == "header length":
        with path.open("r+b") as file:
            file.write(struct.pack("<Q", mutation["length"]))
    else:
        _change_json(path, mutation)


def _change_kind(path: Path, kind: str) -> None:
    if kind == "sparse":
        os.truncate(path, 3 << 30)
        return
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind.startswith("link to "):
        goal = kind.removeprefix("link to ")
        path.symlink_to({"itself": path.name, "nothing": "no such file"}.get(goal, goal))


def _flip(path: Path, share: float, bit: int) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[int(share * (len(data) - 1))] ^= 1 << bit
        path.write_bytes(data)


def _change_json(path: Path, mutation: dict[str, Any]) -> None:
    data = path.read_bytes()
    is_header = path.name.endswith(".safetensors")
    rest = b""
    try:
        if is_header:
            (size,) = struct.unpack("<Q", data[:8])
            data, rest = data[8 : 8 + size], data[8 + size :]
        text = change_text(json.loads(data), mutation).encode("utf-8", "surrogatepass")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error):
        return  # an earlier mutation of the case has taken away what this one changes
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest if is_header else text)


def change_text(document: Any, mutation: dict[str, Any]) -> str:
    """The JSON text of a document after a change of its structure."""
    document = copy.deepcopy(document)
    if mutation["do"] == "extra entries":
        empty = '{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
        extra = ", ".join(f'"extra.{number}": {empty}' for number in range(mutation["count"]))
        return f"{json.dumps(document)[:-1]}, {extra}}}"
    *parents, key = mutation["path"] or [None]
    holder = _at(document, parents)
    if mutation["do"] == "delete":
        del holder[key]
        return json.dumps(document)
    if mutation["do"] == "duplicate":
        if not isinstance(holder, dict):
            holder.insert(key, holder[key])
            return json.dumps(document)
        holder[_MARK] = holder[key]
        return json.dumps(document).replace(json.dumps(_MARK), json.dumps(key))
    holder[key] = _MARK
    return json.dumps(document).replace(json.dumps(_MARK), mutation["json"])
