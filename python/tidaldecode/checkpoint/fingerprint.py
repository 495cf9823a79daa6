"""A short name for a model's files, so that what was measured on one is not taken for another.

Used by plans.py, the evaluation and the calibration.
"""

from __future__ import annotations

import hashlib

from tidaldecode.checkpoint.json_file import list_folder, read_beginning
from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.errors import WeightsError

# More than a tokenizer.json has, and enough of the weights to tell two trainings apart.
_BYTES_READ = 16 * 1024 * 1024


def model_fingerprint(folder: ModelFolder) -> str:
    """16 hex digits that change with the model's files; of weights sizes and beginnings count.

    Raises: WeightsError for a file that cannot be read.
    """
    digest = hashlib.sha256()
    for name in list_folder(folder.path, WeightsError):
        if name.endswith(".safetensors") or name in ("config.json", "tokenizer.json"):
            beginning, size = read_beginning(folder.path / name, _BYTES_READ, WeightsError)
            digest.update(f"{name} {size}\n".encode("utf-8", "surrogateescape"))
            digest.update(hashlib.sha256(beginning).digest())
    return digest.hexdigest()[:16]
