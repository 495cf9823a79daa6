"""What a record belongs to: keys that change with whatever could change an output.

Used by runner.py and perplexity.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from tidaldecode import _core
from tidaldecode.checkpoint.fingerprint import model_fingerprint
from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.config import PlanConfig
from tidaldecode.evaluation.settings import Setting
from tidaldecode.plans import Plan, plan_letters, plan_values


class Keys:
    """Keys of the records of one model, run with the same engine options."""

    def __init__(self, folder: ModelFolder, engine: dict[str, Any]) -> None:
        self._folder = folder
        self._engine = engine
        self._fingerprint = model_fingerprint(folder)
        self._plans: dict[str, Plan | None] = {}

    def of(self, setting: Setting, content: Sequence[Any]) -> str:
        """Of model, version, options and `content`, which is what is decoded.

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
        if setting.name not in self._plans:
            self._plans[setting.name] = setting.plan(self._folder)
        return self._plans[setting.name]

    def plan(self, setting: Setting) -> str:
        """The setting's plan, as Decoder.plan prints it; what is not the engine's has none."""
        if setting.is_quest:
            return "page-wise"
        plan = self._plan(setting)
        return plan_letters(self._folder.model.num_layers, plan.config if plan else PlanConfig())
