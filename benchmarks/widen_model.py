"""A small trained Llama at the shape of a large one: what it answers, at what the large one costs.

    python benchmarks/widen_model.py path/to/reflm-30m OUTPUT [--shape llama-3.1-8b]

Random weights answer nothing, so whatever asks questions (calibrate, eval, verified decoding) does
less at a shape without its weights than with them. Here the function of the small model is kept:
its hidden state stands there several times over, so that norms see the same mean square; heads are
given more dimensions, heads, units and words are added that do nothing, and between its layers lie
others that add nothing. Only queries are rounded otherwise (their scale has another head_dim).
The folder has the large shape's every matrix, in bfloat16: 16 GB for an 8B.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bench_load import safetensors_head
from shapes import SHAPES
from tidaldecode.checkpoint.safetensors_header import read_header

Json = dict[str, Any]
Bits = np.ndarray  # of bfloat16, as uint16

_COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
           "generation_config.json")  # fmt: skip
_NORMS = ("input_layernorm", "post_attention_layernorm")
_PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True)
class Sizes:
    """What the two models' shapes differ in."""

    hidden: int
    intermediate: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, config: Json) -> Sizes:
        """The sizes of a config.json."""
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return cls(
            hidden, config["intermediate_size"], config["num_hidden_layers"], heads,
            config["num_key_value_heads"], config.get("head_dim") or hidden // heads,
            config["vocab_size"],
        )  # fmt: skip

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q_heads // self.kv_heads


class Widening:
    """Where the rows and columns of the small model's matrices go in the large one's."""

    def __init__(self, small: Sizes, large: Sizes):
        self.small, self.large = small, large
        self.copies = large.hidden // small.hidden
        fits = large.hidden % small.hidden == 0 and large.head_dim % small.head_dim == 0
        sizes = ("intermediate", "layers", "kv_heads", "group", "vocab")
        if not fits or any(getattr(small, name) > getattr(large, name) for name in sizes):
            raise SystemExit(f"{small} does not fit into {large}: hidden_size and head_dim must "
                             "divide, and nothing may be larger")  # fmt: skip
        # Rotation turns the pair (i, i + head_dim / 2) by theta^(-2 i / head_dim).
        step, half = large.head_dim // small.head_dim, small.head_dim // 2
        pairs = np.arange(half) * step
        dims = np.concatenate([pairs, large.head_dim // 2 + pairs])
        kv = np.arange(small.kv_heads)
        q = (kv[:, None] * large.group + np.arange(small.group)).ravel()
        self.rows = {
            "q_proj": (q[:, None] * large.head_dim + dims).ravel(),
            "k_proj": (kv[:, None] * large.head_dim + dims).ravel(),
            "gate_proj": np.arange(small.intermediate),
        }
        self.rows |= {"v_proj": self.rows["k_proj"], "up_proj": self.rows["gate_proj"]}
        self.columns = {"o_proj": self.rows["q_proj"], "down_proj": self.rows["gate_proj"]}
        last = max(1, small.layers - 1)
        self.layers = {i * (large.layers - 1) // last: i for i in range(small.layers)}
        heads = {"q_proj": large.q_heads, "k_proj": large.kv_heads, "v_proj": large.kv_heads}
        self.num_rows = {name: count * large.head_dim for name, count in heads.items()}
        self.num_rows |= {"gate_proj": large.intermediate, "up_proj": large.intermediate}

    def inner(self, name: str, value: Bits | None) -> Bits:
        """A projection from the hidden state, or back to it; without a value one of zeros."""
        if name in self.rows:
            matrix = np.zeros((self.num_rows[name], self.large.hidden), np.uint16)
            if value is not None:
                matrix[self.rows[name], : self.small.hidden] = value
            return matrix
        width = {"o_proj": self.num_rows["q_proj"], "down_proj": self.large.intermediate}[name]
        matrix = np.zeros((self.large.hidden, width), np.uint16)
        if value is not None:
            matrix[:, self.columns[name]] = np.tile(value, (self.copies, 1))
        return matrix

    def words(self, value: Bits, *, is_head: bool) -> Bits:
        """Embeddings, or the head; words that are added are like the first, and never first."""
        more = np.broadcast_to(value[:1], (self.large.vocab - len(value), value.shape[1]))
        rows = np.concatenate([value, more])
        if not is_head:
            return np.tile(rows, (1, self.copies))
        matrix = np.zeros((self.large.vocab, self.large.hidden), np.uint16)
        matrix[:, : self.small.hidden] = rows
        return matrix


def read_tensors(folder: Path) -> dict[str, Bits]:
    """A folder's tensors, which must be bfloat16."""
    tensors = {}
    for entry in chain.from_iterable(map(read_header, sorted(folder.glob("*.safetensors")))):
        if entry.dtype != "BF16":
            raise SystemExit(f"{entry.path}: {entry.name} is {entry.dtype}, expected BF16")
        count = entry.num_bytes // 2
        values = np.fromfile(entry.path, np.uint16, count, offset=entry.file_offset)
        tensors[entry.name] = values.reshape(entry.shape)
    return tensors


def scaled(bits: Bits, factor: float) -> Bits:
    """Values times a factor, rounded to the nearest bfloat16."""
    values = (bits.astype(np.uint32) << 16).view(np.float32) * np.float32(factor)
    return ((values.view(np.uint32) + np.uint32(0x8000)) >> 16).astype(np.uint16)


def large_config(small: Json, shape: Json) -> Json:
    """The large shape with what the small model's function depends on."""
    kept = ("rope_theta", "rope_scaling", "rms_norm_eps", "max_position_embeddings",
            "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    if (small["model_type"], shape["model_type"]) != ("llama", "llama"):
        raise SystemExit("a llama is widened to a llama: other families have other norms")
    return shape | {name: small[name] for name in kept if name in small}


def write_layer(file: BinaryIO, widening: Widening, number: int, tensors: dict[str, Bits]) -> None:
    """One layer's tensors as a file of safetensors."""
    live = widening.layers.get(number)
    found: dict[str, Bits] = {}
    for part in _NORMS:
        source = tensors[f"model.layers.{live or 0}.{part}.weight"]
        found[f"{part}.weight"] = np.tile(source, widening.copies)
    factor = math.sqrt(widening.large.head_dim / widening.small.head_dim)
    for block, names in _PROJECTIONS.items():
        for name in names:
            key = f"{block}.{name}.weight"
            value = None if live is None else tensors[f"model.layers.{live}.{key}"]
            if value is not None and name == "q_proj":
                value = scaled(value, factor)
            found[key] = widening.inner(name, value)
    write_file(file, {f"model.layers.{number}.{key}": value for key, value in found.items()})


def write_file(file: BinaryIO, tensors: dict[str, Bits]) -> None:
    """A file of safetensors."""
    file.write(safetensors_head({name: list(value.shape) for name, value in tensors.items()}))
    for value in tensors.values():
        file.write(value.tobytes())


def widen(source: Path, output: Path, shape: Json) -> None:
    """Writes the folder.

    Args:
        source: of a llama in bfloat16, with its tokenizer.
        output: the folder to make.
        shape: config.json of the large one, whose sizes are multiples or larger.

    Raises: SystemExit, with what does not fit.
    """
    config = json.loads((source / "config.json").read_text())
    large = large_config(config, shape)
    widening, tensors = Widening(Sizes.of(config), Sizes.of(large)), read_tensors(source)
    embeddings = tensors["model.embed_tokens.weight"]
    output.mkdir(parents=True)
    (output / "config.json").write_text(json.dumps(large, indent=1))
    for name in _COPIED:
        if (source / name).exists():
            shutil.copy(source / name, output / name)
    count = large["num_hidden_layers"]
    for number in range(count):
        with (output / f"model-{number:03}.safetensors").open("xb") as file:
            write_layer(file, widening, number, tensors)
    ends = {
        "model.embed_tokens.weight": widening.words(embeddings, is_head=False),
        "model.norm.weight": np.tile(tensors["model.norm.weight"], widening.copies),
    }
    if not large["tie_word_embeddings"]:
        head = tensors.get("lm_head.weight", embeddings)
        ends["lm_head.weight"] = widening.words(head, is_head=True)
    with (output / f"model-{count:03}.safetensors").open("xb") as file:
        write_file(file, ends)
    write_index(output)


def write_index(folder: Path) -> None:
    """The list of which tensor lies in which file."""
    paths = sorted(folder.glob("*.safetensors"))
    where = {entry.name: path.name for path in paths for entry in read_header(path)}
    total = sum(path.stat().st_size for path in paths)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES))
    args = parser.parse_args()
    widen(args.model, args.output, SHAPES[args.shape].config)
    print(args.output)


if __name__ == "__main__":
    main()
