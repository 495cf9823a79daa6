"""Which modules a list in quantization_config names: names, patterns and classes.

Called by quantization.py and compressed_tensors.py. The patterns come from a file, so one that
could take long to match is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tidaldecode.errors import ConfigError, show

_MAX_PATTERN = 1000  # characters
_MAX_REPEATS = 4  # more of them can take a pattern long to fail


def compile_pattern(text: str, where: str) -> re.Pattern[str]:
    """A pattern of module names that cannot take long to match, whatever a file says.

    Raises: ConfigError for one that is none, or that could.
    """
    plain = re.sub(r"\\.", "x", text)  # without what is escaped
    num_repeats = len(re.findall(r"[*+{]", plain))
    repeats_group = re.search(r"\)[*+{]", plain) is not None
    if len(text) > _MAX_PATTERN or num_repeats > _MAX_REPEATS or repeats_group:
        raise ConfigError(
            f"{where}: got the pattern {show(text)}, expected at most {_MAX_PATTERN} characters "
            f"and {_MAX_REPEATS} repetitions, none of a group"
        )
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as cause:
        raise ConfigError(f"{where}: got the pattern {show(text)}: {cause}") from cause


def is_name(target: str, name: str) -> bool:
    """Whether a target of a group is a module's name."""
    return target == name


def is_pattern_of(target: str, name: str) -> bool:
    """Whether a target is a pattern that a module's name fits."""
    return target.startswith("re:") and re.match(target[3:], name) is not None


def is_class_of(target: str, name: str) -> bool:
    """Whether a target is the class of a module."""
    return target == ("Embedding" if name.endswith("embed_tokens") else "Linear")


@dataclass(frozen=True)
class TargetNames:
    """Names, "re:" patterns and classes, which mean what they mean to compressed-tensors."""

    targets: tuple[str, ...] = ()

    @classmethod
    def read(cls, targets: tuple[str, ...], where: str) -> TargetNames:
        """Raises: ConfigError for a pattern that is none, or that could take long to match."""
        for target in targets:
            if target.startswith("re:"):
                compile_pattern(target[3:], where)
        return cls(targets)

    def has(self, name: str) -> bool:
        """Whether a module is one of them."""
        ranks = (is_name, is_pattern_of, is_class_of)
        return any(rank(target, name) for target in self.targets for rank in ranks)


@dataclass(frozen=True)
class PartialNames:
    """Beginnings, up to a module's end, and ends of names; a key is a pattern too.

    As transformers decides it (should_convert_module).
    """

    keys: tuple[str, ...] = ()

    @classmethod
    def read(cls, keys: tuple[str, ...], where: str) -> PartialNames:
        """Raises: ConfigError for a key that is no pattern, or could take long to match."""
        for key in keys:
            compile_pattern(key, where)
        return cls(keys)

    def has(self, name: str) -> bool:
        """Whether a module is one of them."""
        return any(self._fits(key, name) for key in self.keys)

    @staticmethod
    def _fits(key: str, name: str) -> bool:
        if name.endswith(key):
            return True
        found = re.match(key, name)
        if found is None:
            return False
        end = found.end()
        return end == len(name) or "." in (name[end], name[end - 1 : end])
