"""The error types a caller can act on, one per kind of trouble.

The C++ engine throws the same types (cpp/include/tidal/error.h); the bindings turn each into the
class of the same name here. Every message says what it is about, what was got, what was expected
and what to do.
"""

from __future__ import annotations


class TidalError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(TidalError):
    """config.json, a plan file, the tokenizer or a DecodeConfig says something impossible."""


class WeightsError(TidalError):
    """A weight file is missing, unreadable or damaged, or a tensor is not what the model needs."""


class UnsupportedError(TidalError):
    """The request is meaningful, but this build or device does not do it."""


class OutOfMemoryError(TidalError, MemoryError):
    """Host or device memory does not suffice."""


class BackendError(TidalError):
    """The device or one of its libraries failed."""


class InvalidArgument(TidalError, ValueError):
    """A value passed to a call is out of range or of the wrong kind."""


class CapacityError(InvalidArgument):
    """A request needs more cache, batch rows or positions than the decoder was built with."""


def show(value: object, limit: int = 60) -> str:
    """`value` for an error message: one line, printable, bounded.

    A value that cannot show itself (its repr raises, or is no text) is named by its type: the error
    that it is shown in matters more.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (str, bytes)):
        value = value[: limit + 1]
    try:
        text = ascii(value)
    except Exception:
        text = f"a {type(value).__name__}"
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."
