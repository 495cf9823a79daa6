"""tidaldecode: long-context decoding with position persistent sparse attention (TidalDecode).

    import tidaldecode
    decoder = tidaldecode.Decoder("path/to/model")
    print(decoder.generate("Once upon a time", max_new_tokens=40).text)

A model folder goes in unmodified; a C++/CUDA engine does the work of every step. Importing needs
no GPU, no driver and no torch.
"""

import logging as _logging
import os as _os

from tidaldecode._engine import _core as _core
from tidaldecode.checkpoint.model_folder import demo_model_dir
from tidaldecode.config import DecodeConfig, PlanConfig
from tidaldecode.decoder import Decoder
from tidaldecode.errors import (
    BackendError,
    CapacityError,
    ConfigError,
    InvalidArgument,
    OutOfMemoryError,
    TidalError,
    UnsupportedError,
    WeightsError,
)
from tidaldecode.memory_plan import MemoryPlan, plan_memory
from tidaldecode.requests import Request
from tidaldecode.results import GenerationResult, Timings, TokenLogprobs, Verification
from tidaldecode.session import Session
from tidaldecode.stream import TextStream
from tidaldecode.text.guide import Guide

__version__: str = _core.version()

__all__ = [
    "BackendError",
    "CapacityError",
    "ConfigError",
    "DecodeConfig",
    "Decoder",
    "GenerationResult",
    "Guide",
    "InvalidArgument",
    "MemoryPlan",
    "OutOfMemoryError",
    "PlanConfig",
    "Request",
    "Session",
    "TextStream",
    "TidalError",
    "Timings",
    "TokenLogprobs",
    "UnsupportedError",
    "Verification",
    "WeightsError",
    "__version__",
    "demo_model_dir",
    "plan_memory",
]

# The one environment variable: the level of the package's log, for example TIDAL_LOG=debug.
_level = _logging.getLevelName(_os.environ.get("TIDAL_LOG", "").upper())
if isinstance(_level, int):
    _logging.getLogger("tidaldecode").setLevel(_level)
