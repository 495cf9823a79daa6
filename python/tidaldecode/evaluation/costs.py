"""KV bytes of a step, setting by setting: what the sets that were measured make a step read.

Used by report.py and perplexity.py through command.py, and by presets.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.config import DecodeConfig, PlanConfig
from tidaldecode.engine_config import core_config
from tidaldecode.evaluation.quest import page_bytes_per_step
from tidaldecode.evaluation.results import LossRecord, Record
from tidaldecode.evaluation.settings import Setting
from tidaldecode.plan_bytes import kv_bytes_per_step

_MOST_POSITIONS = 2**31 - 1  # of a set; a damaged file of records may say more


def cache_dtype(folder: ModelFolder, engine: dict[str, Any]) -> str:
    """The dtype of the KV cache.

    Args:
        folder: the model.
        engine: options of Decoder.
    """
    return core_config(DecodeConfig(**engine), None, folder).kv_dtype


class StepCosts:
    """Bytes of keys and values that the steps behind a record read, each on average."""

    def __init__(self, folder: ModelFolder, settings: Sequence[Setting], kv_dtype: str) -> None:
        self._folder, self._settings, self._kv_dtype = folder, settings, kv_dtype
        self._configs: dict[int, PlanConfig] = {}

    def of(self, record: Record | LossRecord) -> int:
        """At the record's context; of a prompt that has none, at its own length."""
        seq_len = record.context
        if seq_len is None:
            assert isinstance(record, Record), "a text has a context"
            seq_len = record.prompt_tokens
        index, setting = next(
            (index, setting)
            for index, setting in enumerate(self._settings)
            if setting.name == record.setting and setting.runs_at(record.context)
        )
        if setting.is_quest:
            return page_bytes_per_step(self._folder.model, setting.options, seq_len, self._kv_dtype)
        config = PlanConfig()  # where no step was sparse
        if record.set_size > 0:
            # The sets that were measured: an adaptive budget is a cap.
            size = max(1, round(min(record.set_size, _MOST_POSITIONS)))
            config = replace(self._config(index, setting), token_budget=size)
        return kv_bytes_per_step(self._folder.model, config, seq_len, self._kv_dtype)

    def _config(self, index: int, setting: Setting) -> PlanConfig:
        if index not in self._configs:
            plan = setting.plan(self._folder)
            self._configs[index] = plan.config if plan else PlanConfig()
        return self._configs[index]
