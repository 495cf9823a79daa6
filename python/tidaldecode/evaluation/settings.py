"""The ways a model is decoded in one evaluation: densely, and with one or more tidal settings.

Called by command.py; presets.py has settings with names of their own. A setting is a name and
options of Decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.cli.options import parse_layers
from tidaldecode.config import LAYER_FIELDS, PLAN_FIELDS, PlanConfig
from tidaldecode.errors import InvalidArgument, show
from tidaldecode.plans import Plan, choose_plan
from tidaldecode.sampling import check_integer

DENSE = "dense"
_TEXT_FIELDS = ("granularity", "pooling", "shadow")
_FLOAT_FIELDS = ("top_p_mass",)
_QUEST_DEFAULTS = {"token_budget": 64, "page_size": 16}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to decode."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)  # of Decoder; for quest see quest.py
    is_quest: bool = False  # not the engine's
    # Contexts at which it runs; empty: at all. Settings of one name have no context in common.
    contexts: tuple[int | None, ...] = ()

    def runs_at(self, context: int | None) -> bool:
        """Whether prompts and windows of this context are decoded in this setting."""
        return not self.contexts or context in self.contexts

    def plan(self, folder: ModelFolder) -> Plan | None:
        """The plan that the engine runs; None is dense.

        Raises: ConfigError if the setting does not fit the model.
        """
        options = {name: value for name, value in self.options.items() if name != "attention"}
        return choose_plan(PlanConfig(**options), self.options["attention"], folder)


def dense_setting() -> Setting:
    """What every other setting is compared with."""
    return Setting(name=DENSE, options={"attention": "full"})


def tidal_setting(text: str) -> Setting:
    """A setting from what a user writes: "select_layers=2,9 token_budget=64", empty for the plan.

    Steps are sparse at every length unless sparse_min_context is among the options: an evaluation
    asks what the sets are worth, not where they are faster.

    Raises: InvalidArgument for another form or field; values are checked by the Decoder.
    """
    options: dict[str, Any] = {}
    for part in text.split():
        name, has_value, value = part.partition("=")
        if not has_value or name not in PLAN_FIELDS:
            raise InvalidArgument(
                f"tidal: got {show(part)}, expected settings such as 'select_layers=2,9 "
                f"token_budget=64', of {', '.join(PLAN_FIELDS)}"
            )
        if name in options:
            raise InvalidArgument(f"tidal: {name} is given twice in {show(text)}, expected once")
        options[name] = _read_value(name, value)
    shown = " ".join(text.split())
    options.setdefault("sparse_min_context", 0)
    return Setting(name=f"tidal {shown}".strip(), options={"attention": "tidal", **options})


def quest_setting(text: str) -> Setting:
    """A page-wise setting (quest.py) from what a user writes: "token_budget=64 page_size=16".

    Raises: InvalidArgument for another form or field.
    """
    given: dict[str, int] = {}
    for part in text.split():
        name, _, value = part.partition("=")
        if name not in _QUEST_DEFAULTS or not value.isdecimal():
            raise InvalidArgument(
                f"quest: got {show(part)}, expected settings such as 'token_budget=64 page_size=16'"
            )
        if name in given:
            raise InvalidArgument(f"quest: {name} is given twice in {show(text)}, expected once")
        given[name] = check_integer(f"quest: {name}", int(value), low=1)
    options = _QUEST_DEFAULTS | given
    if options["page_size"] > options["token_budget"]:
        raise InvalidArgument(
            f"quest: got page_size {options['page_size']}, expected at most token_budget "
            f"{options['token_budget']}"
        )
    shown = " ".join(f"{name}={value}" for name, value in options.items())
    return Setting(name=f"quest {shown}", options=options, is_quest=True)


def check_names(settings: Sequence[Setting]) -> None:
    """Every setting once.

    Raises: InvalidArgument naming the one that is there twice.
    """
    names = [setting.name for setting in settings]
    for name in names:
        if names.count(name) > 1:
            option = name.partition(" ")[0]
            raise InvalidArgument(
                f"{option}: {show(name)} is given twice, expected different settings"
            )


def _read_value(name: str, value: str) -> Any:
    if name in LAYER_FIELDS:
        return parse_layers(value, f"tidal: {name}")
    if name in _TEXT_FIELDS or value == "auto":
        return value
    kind, expected = (float, "a number") if name in _FLOAT_FIELDS else (int, "an integer")
    try:
        return kind(value)
    except ValueError:
        raise InvalidArgument(f"tidal: {name}: got {show(value)}, expected {expected}") from None
