"""A short name for a model's files, so that what was measured on one is not taken for another.

Used by plans.py, the evaluation and the calibration.
"""

from __future__ import annotations

import hashlib
import os

from tidaldecode.checkpoint.json_file import open_regular_file, read_exactly
from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.errors import WeightsError

# More than a tokenizer.json has, and enough of the weights to tell two trainings apart.
_BYTES_READ = 16 * 1024 * 1024


def model_fingerprint(folder: ModelFolder) -> str:
    """16 hex digits that change with the model's files; of weights sizes and beginnings count.

    Raises: WeightsError for a file that cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.path.iterdir()):
        if path.suffix == ".safetensors" or path.name in ("config.json", "tokenizer.json"):
            descriptor, size = open_regular_file(path, WeightsError)
            try:
                beginning = read_exactly(descriptor, 0, _BYTES_READ)
            finally:
                os.close(descriptor)
            digest.update(f"{path.name} {size}\n".encode())
            digest.update(hashlib.sha256(beginning).digest())
    return digest.hexdigest()[:16]
