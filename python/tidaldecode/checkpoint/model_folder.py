"""A Hugging Face model folder on disk, read and checked: the first stop from model_dir to text.

decoder.py hands what is found here to the C++ engine. Nothing in a folder is executed, and no
tensor is read yet, but for an output matrix beside tied embeddings (tensor_names.py) and the small
parts that say how a quantised matrix is stored (quantized_tensors.py). A model of
the hub is found by hub.py.
"""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidaldecode.checkpoint.generation_defaults import GenerationDefaults, read_generation_defaults
from tidaldecode.checkpoint.hub import (
    find_model,
    is_cache_folder,
    model_name,
    parse_hub_id,
    snapshot_in,
    split_revision,
)
from tidaldecode.checkpoint.model_config import ModelConfig, read_checkpoint_config
from tidaldecode.checkpoint.quant_scheme import Quantization
from tidaldecode.checkpoint.quantized_tensors import WEIGHT_DTYPES, QuantizedTensor
from tidaldecode.checkpoint.safetensors_header import TensorEntry
from tidaldecode.checkpoint.tensor_names import ModelTensors
from tidaldecode.checkpoint.weight_files import find_weights
from tidaldecode.errors import ConfigError, show

_logger = logging.getLogger("tidaldecode")


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """What a folder says about its model."""

    path: Path
    family: str
    name: str  # the model's own name if the config gives one, else the folder's
    dtype: str  # "float32", "bfloat16" or "float16"
    model: ModelConfig
    generation: GenerationDefaults
    eos_token_ids: tuple[int, ...]  # of config.json and generation_config.json, ascending
    load_format: str  # of DecodeConfig
    weights: tuple[TensorEntry | QuantizedTensor, ...]  # none for load_format "dummy"
    cache_scales: tuple[TensorEntry, ...] = ()  # of an fp8 KV cache
    quantization: Quantization | None = None  # None: weights as they are
    notes: tuple[str, ...] = ()  # for the user: what was found and not taken as it stands

    @property
    def title(self) -> str:
        """What the folder is called: its own name, or its hub id in the hub's cache."""
        return model_name(self.path)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(entry.num_bytes for entry in self.weights)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all tensors, the quantised ones decoded to 16 bits."""
        return sum(
            entry.decoded_bytes if isinstance(entry, QuantizedTensor) else entry.num_bytes
            for entry in self.weights
        )

    def log_notes(self, max_seq_len: int | None) -> None:
        """Logs what the user should know before the model is used with this max_seq_len."""
        for note in self.notes:
            _logger.warning("%s", note)
        trained_len = self.model.max_position_embeddings
        if max_seq_len is not None and max_seq_len > trained_len:
            _logger.warning(
                "max_seq_len %d is more than the model's max_position_embeddings %d: expect poor "
                "text beyond it",
                max_seq_len,
                trained_len,
            )


def read_model_folder(
    model_dir: str | os.PathLike[str],
    load_format: str = "auto",
    max_seq_len: int | None = None,
) -> ModelFolder:
    """Reads config.json, generation_config.json and the headers of the weight files.

    Args:
        model_dir: a model folder, a models--org--name folder of a hub cache, or a hub id,
            "org/name" or "org/name@revision", which is downloaded if it is not in that cache.
        load_format: as in DecodeConfig; for "dummy" the folder needs no weight files.
        max_seq_len: as in DecodeConfig.

    Raises:
        ConfigError: no such folder or model, or a configuration that is damaged or not supported.
        WeightsError: weight files that are missing, damaged or do not fit the configuration.
    """
    path = _resolve_folder(model_dir, needs_weights=load_format != "dummy")
    checkpoint = read_checkpoint_config(path / "config.json", max_seq_len)
    generation = read_generation_defaults(
        path / "generation_config.json", checkpoint.model.vocab_size
    )
    tensors = ModelTensors(entries=[], model=checkpoint.model, notes=())
    if load_format != "dummy":
        tensors = find_weights(path, checkpoint)
    # The config's word counts, as in transformers; files alone decide only where it is silent.
    plain = (entry.dtype for entry in tensors.entries if isinstance(entry, TensorEntry))
    stored_dtype = WEIGHT_DTYPES[next(plain, "BF16")]
    return ModelFolder(
        path=path,
        family=checkpoint.family,
        name=checkpoint.name or model_name(path),
        dtype=checkpoint.dtype or stored_dtype,
        model=tensors.model,
        generation=generation,
        eos_token_ids=tuple(sorted({*checkpoint.eos_token_ids, *generation.eos_token_ids})),
        load_format=load_format,
        weights=tuple(tensors.entries),
        cache_scales=tensors.cache_scales,
        quantization=checkpoint.quantization,
        # Once each: an older model's generation settings are in its config.json.
        notes=tuple(dict.fromkeys((*checkpoint.notes, *generation.notes, *tensors.notes))),
    )


def demo_model_dir() -> Path:
    """The folder of the embedded model: 6.8M parameters, with a plan beside it."""
    return Path(__file__).parents[1] / "models" / "tidal-demo"


def at_revision(model_dir: str | os.PathLike[str], revision: str | None) -> str | os.PathLike[str]:
    """The name of a model with the revision that is asked for besides, as "org/name@revision".

    Raises: ConfigError for a revision that is no text, or another one in the name already.
    """
    if revision is None:
        return model_dir
    name = _as_text(model_dir)
    if not isinstance(revision, str):
        raise ConfigError(f"revision: got {show(revision)}, expected a text")
    base, named = (name, None) if os.path.lexists(name) else split_revision(name)
    if named is not None and named != revision:
        raise ConfigError(
            f"revision: got {show(revision)}, but model_dir names {show(named)}; expected one"
        )
    return f"{base}@{revision}"


def _as_text(model_dir: Any) -> str:
    """model_dir as a text without a NUL, "~" for the user's home resolved."""
    try:
        name = os.fspath(model_dir)
    except TypeError:
        name = None
    if not isinstance(name, str) or not name or "\0" in name:
        raise ConfigError(
            f"model_dir: got {show(model_dir)}, expected a folder's path or a hub id (org/name)"
        )
    return os.path.expanduser(name)


def _resolve_folder(model_dir: str | os.PathLike[str], needs_weights: bool) -> Path:
    """The folder that a path or a hub id means; of the hub's cache that of a snapshot."""
    name = _as_text(model_dir)
    base, revision = (name, None) if os.path.lexists(name) else split_revision(name)
    path = Path(base)
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        hub_id = parse_hub_id(base, revision)
        if hub_id is not None:
            return find_model(hub_id, needs_weights)
        raise ConfigError(
            f"{show(name, 200)}: no such folder; expected a model folder, or a hub id as org/name"
        ) from None
    except (OSError, ValueError) as cause:  # ValueError: a lone surrogate in the name
        reason = getattr(cause, "strerror", None) or str(cause)
        raise ConfigError(f"model_dir: {show(name, 200)}: {reason}") from cause
    if not is_folder:
        raise ConfigError(f"{path}: is a file; expected the folder that holds config.json")
    if is_cache_folder(path):
        path = snapshot_in(path, revision)
    elif revision is not None:
        raise ConfigError(
            f"revision: got {show(revision)} with the local folder {path}; expected none: a "
            "revision belongs to a hub id"
        )
    if not os.path.lexists(path / "config.json"):
        adapter = os.path.lexists(path / "adapter_config.json")
        hint = "; it holds an adapter: merge it into its model first (merge_and_unload)"
        raise ConfigError(
            f"{path}: no config.json in it; expected a Hugging Face model folder"
            f"{hint if adapter else ''}"
        )
    return path
