"""Loads the engine's module, and with it OpenBLAS without threads of its own.

OpenBLAS starts a thread for every processor as soon as it is loaded, and each looks for work for a
while: seconds of processor time on a large machine. The engine calls it from threads of its own.
"""

from __future__ import annotations

import os

_given = os.environ.get("OPENBLAS_NUM_THREADS")
os.environ["OPENBLAS_NUM_THREADS"] = "1"
try:
    from tidaldecode import _core
finally:  # numpy's own OpenBLAS, loaded later, is not ours to limit
    if _given is None:
        del os.environ["OPENBLAS_NUM_THREADS"]
    else:
        os.environ["OPENBLAS_NUM_THREADS"] = _given

__all__ = ["_core"]
