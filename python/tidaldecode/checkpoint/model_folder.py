"""A Hugging Face model folder on disk, read and checked: the first stop from model_dir to text.

decoder.py hands what is found here to the C++ engine. Nothing in a folder is executed, and no
tensor is read yet, but for an output matrix beside tied embeddings (tensor_names.py).
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from tidaldecode.checkpoint.generation_defaults import GenerationDefaults, read_generation_defaults
from tidaldecode.checkpoint.model_config import ModelConfig, read_checkpoint_config
from tidaldecode.checkpoint.safetensors_header import TensorEntry
from tidaldecode.checkpoint.tensor_names import ModelTensors
from tidaldecode.checkpoint.weight_files import WEIGHT_DTYPES, find_weights
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
    weights: tuple[TensorEntry, ...]  # none for load_format "dummy"
    notes: tuple[str, ...] = ()  # for the user: what was found and not taken as it stands

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(entry.num_bytes for entry in self.weights)

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


def read_model_folder(model_dir: str | os.PathLike[str], load_format: str = "auto") -> ModelFolder:
    """Reads config.json, generation_config.json and the headers of the weight files.

    Args:
        model_dir: a local folder.
        load_format: as in DecodeConfig; for "dummy" the folder needs no weight files.

    Raises:
        ConfigError: no such folder, or a configuration that is damaged or not supported.
        WeightsError: weight files that are missing, damaged or do not fit the configuration.
    """
    path = _resolve_folder(model_dir)
    checkpoint = read_checkpoint_config(path / "config.json")
    generation = read_generation_defaults(
        path / "generation_config.json", checkpoint.model.vocab_size
    )
    tensors = ModelTensors(entries=[], model=checkpoint.model, notes=())
    if load_format != "dummy":
        tensors = find_weights(path, checkpoint.model)
    # The config's word counts, as in transformers; files alone decide only where it is silent.
    stored_dtype = WEIGHT_DTYPES[tensors.entries[0].dtype] if tensors.entries else "bfloat16"
    return ModelFolder(
        path=path,
        family=checkpoint.family,
        name=checkpoint.name or path.name,
        dtype=checkpoint.dtype or stored_dtype,
        model=tensors.model,
        generation=generation,
        eos_token_ids=tuple(sorted({*checkpoint.eos_token_ids, *generation.eos_token_ids})),
        load_format=load_format,
        weights=tuple(tensors.entries),
        notes=(*checkpoint.notes, *generation.notes, *tensors.notes),
    )


def demo_model_dir() -> Path:
    """The folder of the embedded model: 6.8M parameters, with a plan beside it."""
    return Path(__file__).parents[1] / "models" / "tidal-demo"


def _resolve_folder(model_dir: str | os.PathLike[str]) -> Path:
    try:
        path = Path(model_dir)
        is_folder = path.is_dir()
        exists = path.exists()
    except (TypeError, ValueError) as cause:
        raise ConfigError(f"model_dir: got {show(model_dir)}, expected a folder's path") from cause
    except OSError as cause:
        raise ConfigError(f"model_dir: {show(model_dir, 200)}: {cause.strerror}") from cause
    if is_folder:
        if not (path / "config.json").is_symlink() and not (path / "config.json").exists():
            raise ConfigError(f"{path}: no config.json in it; expected a Hugging Face model folder")
        return path
    if exists:
        raise ConfigError(f"{path}: is a file; expected the folder that holds config.json")
    name = str(model_dir)
    hint = ""
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        local = name.split("/")[1]
        hint = f"; to download it from the Hugging Face hub: hf download {name} --local-dir {local}"
    raise ConfigError(f"{show(name, 200)}: no such folder; expected a local model folder{hint}")
