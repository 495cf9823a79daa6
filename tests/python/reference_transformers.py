"""Which transformers the tests compare with."""

from __future__ import annotations

# Older ones do some things otherwise; Python 3.10 has 5.20 at most.
TRANSFORMERS = "5.24"
