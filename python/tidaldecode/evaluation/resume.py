"""What a record belongs to: keys that change with whatever could change an output.

Used by runner.py and perplexity.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Sequence
from typing import Any

from tidaldecode import _core
from tidaldecode.checkpoint.fingerprint import model_fingerprint
from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.config import PlanConfig
from tidaldecode.evaluation.settings import Setting
from tidaldecode.plans import Plan, plan_letters, plan_values

Wanted = tuple[Setting, str]  # a setting and the key of its record


def missing(wanted: Sequence[Wanted], known: Container[str]) -> dict[str, Setting]:
    """What is not known, by key: of settings that come to the same, the first."""
    found: dict[str, Setting] = {}
    for setting, key in wanted:
        if key not in known:
            found.setdefault(key, setting)
    return found


class Keys:
    """Keys of the records of one model, run with the same engine options."""

    def __init__(self, folder: ModelFolder, engine: dict[str, Any]) -> None:
        self._folder = folder
        self._engine = engine
        self._fingerprint = model_fingerprint(folder)
        self._plans: dict[tuple[Any, ...], Plan | None] = {}

    def wanted(
        self, settings: Sequence[Setting], context: int | None, content: Sequence[Any]
    ) -> list[Wanted]:
        """The settings that run at a context, each with its key of `content`."""
        own = [setting for setting in settings if setting.runs_at(context)]
        return [(setting, self.of(setting, content)) for setting in own]

    def of(self, setting: Setting, content: Sequence[Any]) -> str:
        """The key of model, version, options and `content`, which is what is decoded.

        Raises: ConfigError if the setting does not fit the model.
        """
        used: Any = setting.options
        if not setting.is_quest:
            # Settings of a stored plan hold wherever an option does not say otherwise.
            plan = self._plan(setting)
            used = plan_values(plan.config) if plan else None
        parts = [self._fingerprint, _core.version(), self._engine, used, content]
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _plan(self, setting: Setting) -> Plan | None:
        # A preset has one name and at every context options of its own.
        place = setting.name, setting.contexts
        if place not in self._plans:
            self._plans[place] = setting.plan(self._folder)
        return self._plans[place]

    def plan(self, setting: Setting) -> str:
        """The setting's plan, as Decoder.plan prints it; what is not the engine's has none."""
        if setting.is_quest:
            return "page-wise"
        plan = self._plan(setting)
        return plan_letters(self._folder.model.windows, plan.config if plan else PlanConfig())
