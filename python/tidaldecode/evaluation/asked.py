"""The options of `tidaldecode eval` that say what is decoded, and the prompts that they mean.

Called by command.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from tidaldecode.errors import InvalidArgument, show
from tidaldecode.evaluation.example import Encode, Series
from tidaldecode.evaluation.interval import MOST_ASKED
from tidaldecode.evaluation.perplexity import SCORED_TOKENS, Window, make_windows, read_text
from tidaldecode.evaluation.presets import PRESETS, Lengths
from tidaldecode.evaluation.prompt_file import read_prompt_file
from tidaldecode.evaluation.tasks import TASKS, make_series
from tidaldecode.sampling import check_integer

DEFAULT_CONTEXT = 4096
DEFAULT_PROMPTS = 10  # per task and context: every depth of the single needle once
OWN_NEW_TOKENS = 64
DEFAULT_WINDOWS = 8  # of a text, at each context


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options that say what is decoded."""

    task: list[str] | None
    prompts: Path | None
    text: Path | None
    context: list[int] | None
    limit: int | None
    interval: float | None
    scored_tokens: int | None
    seed: int
    max_new_tokens: int | None
    compare: str | None
    token_budget: int | None

    def check(self) -> None:
        """Refuses what does not go together."""
        if self.prompts is not None and self.task:
            raise InvalidArgument("prompts: got a file together with --task, expected one")
        if self.prompts is not None and self.context and self.text is None:
            raise InvalidArgument("prompts: got a file together with --context, expected one")
        if self.prompts is None and self.max_new_tokens is not None:
            raise InvalidArgument("max-new-tokens: got it without --prompts; tasks have their own")
        if self.text is None and self.scored_tokens is not None:
            raise InvalidArgument("scored-tokens: got it without --text, which it belongs to")
        if self.compare is not None and self.compare != PRESETS:
            raise InvalidArgument(f"compare: got {show(self.compare)}, expected {PRESETS!r}")
        if self.compare is None and self.token_budget is not None:
            raise InvalidArgument(
                f"token-budget: got it without --compare {PRESETS}, which it belongs to; for a "
                "setting of your own give --tidal"
            )
        for name in ("limit", "scored_tokens", "token_budget"):
            if (value := getattr(self, name)) is not None:
                check_integer(name, value, low=1)
        if self.interval is not None and not 0 < self.interval < 1:
            raise InvalidArgument(
                f"interval: got {show(self.interval)}, expected a width between 0 and 1, for "
                "example 0.1"
            )
        if self.interval is not None and not self._has_prompts:
            raise InvalidArgument(
                "interval: got it with a text alone, expected --task or --prompts, whose answers "
                "it counts"
            )

    @property
    def contexts(self) -> list[int]:
        """The contexts of tasks and windows, each once: what is asked twice would count twice."""
        return list(dict.fromkeys(self.context or [DEFAULT_CONTEXT]))

    @property
    def _has_prompts(self) -> bool:
        return self.prompts is not None or self.text is None or bool(self.task)

    def series(self, encode: Encode) -> list[Series]:
        """The prompts: own ones, or those of the generated tasks; none for a text alone."""
        if not self._has_prompts:
            return []
        most = MOST_ASKED if self.interval is not None else None
        if self.prompts is not None:
            return [self._own_series(self.prompts, encode, most)]
        return make_series(
            list(dict.fromkeys(self.task or TASKS)),
            encode,
            self.contexts,
            most=self.limit or most or DEFAULT_PROMPTS,
            seed=self.seed,
        )

    def _own_series(self, path: Path, encode: Encode, most: int | None) -> Series:
        new_tokens = OWN_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        check_integer("max_new_tokens", new_tokens, low=1)
        examples = read_prompt_file(
            path, encode, max_new_tokens=new_tokens, limit=self.limit or most
        )
        lengths = [len(example.prompt_ids) for example in examples]
        return Series(
            context=None,
            most=len(examples),
            room=max(lengths) + new_tokens,
            length=round(fmean(lengths)),
            make=examples.__getitem__,
        )

    def windows(self, encode: Encode) -> list[Window]:
        """The windows of the text, if there is one."""
        if self.text is None:
            return []
        return make_windows(
            read_text(self.text),
            encode,
            self.contexts,
            count=self.limit or DEFAULT_WINDOWS,
            scored_tokens=self.scored_tokens or SCORED_TOKENS,
        )


def lengths_of(series: Sequence[Series], windows: Sequence[Window]) -> Lengths:
    """How long sequences are, by context; own prompts, which have none, are so on average."""
    found: dict[int | None, int] = {entry.context: entry.length for entry in series}
    return found | {window.context: window.context for window in windows}
