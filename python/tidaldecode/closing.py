"""What decoders, sessions, streams and replays share: `with` closes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import NoReturn, SupportsIndex, TypeVar

from tidaldecode.errors import UnsupportedError

_Self = TypeVar("_Self", bound="Closing")


class Closing(ABC):
    """A thing with `close`, which the end of a `with` block calls, whatever ended it."""

    @abstractmethod
    def close(self) -> None:
        """Gives back what is held. Any later use is an error."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        # A copy would close what both hold.
        raise UnsupportedError(
            f"{type(self).__name__}: it cannot be copied or pickled; share it, or open another one"
        )

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
