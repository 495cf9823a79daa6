"""Prompts in the cache, continued with one plan after the other: how plans are compared.

Made by Decoder.replay(); used by the evaluation and the calibration. Reading a long prompt costs a
hundred times what answering it does, and the keys and values of a prompt do not depend on the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tidaldecode import _core
from tidaldecode.batch import PrefillProgress, heard
from tidaldecode.call_lock import CallLock
from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.closing import Closing
from tidaldecode.config import PlanConfig, check_setting
from tidaldecode.engine_config import core_plan
from tidaldecode.plans import choose_plan
from tidaldecode.sampling import check_callback, check_integer
from tidaldecode.text.prompts import check_continuations

if TYPE_CHECKING:
    import numpy as np


class Replay(Closing):
    """Prompts that have been read, for steps of any plan. Close it to free its pages.

    Every method takes the options of Decoder that make a plan: attention and the fields of
    PlanConfig. A prompt's keys and values are dense: a correction rewrites those of what follows
    it.
    """

    def __init__(self, core: _core.Replay, folder: ModelFolder) -> None:
        self._core = core
        self._folder = folder
        self._turn = CallLock()  # of its calls
        self._sets = (0, 0)  # of the last call: how many, and positions in all of them
        # Reading a plan file for every call would take longer than many a step.
        self._plans: dict[tuple[PlanConfig, str], _core.PlanConfig] = {}

    def read(self, on_prefill: PrefillProgress | None = None) -> None:
        """Reads what is not in the cache yet.

        Args:
            on_prefill: called with (tokens done, tokens in all) meanwhile.

        Raises: InvalidArgument for what cannot be called so.
        """
        check_callback("on_prefill", on_prefill, 2)
        with self._turn, heard(self._core.read(), on_prefill):
            pass

    def step_logits(self, continuations: Sequence[Sequence[int]], **plan: Any) -> list[np.ndarray]:
        """Logits of decode steps over given tokens (teacher forcing), all prompts together.

        Args:
            continuations: token ids to follow each prompt; their numbers may differ.
            plan: options of Decoder.

        Returns: one [len(continuation) + 1, vocab_size] float32 a prompt; row i follows the prompt
            and i tokens.
        Raises: InvalidArgument; ConfigError for a plan that does not fit the model; CapacityError
            for more tokens than there is room for.
        """
        vocab_size = self._folder.model.vocab_size
        ids = check_continuations(continuations, vocab_size)
        with self._turn, heard(self._core.step_logits(self._plan(plan), ids)) as generation:
            self._count_sets(generation)
            logits = [generation.take_logits(index) for index in range(len(ids))]
        return [rows.reshape(-1, vocab_size) for rows in logits]

    def greedy(self, max_new_tokens: int, **plan: Any) -> list[list[int]]:
        """The most likely tokens, as generate(temperature=0) of a decoder with this plan.

        Args:
            max_new_tokens: most tokens to generate; the model's end-of-text tokens end earlier and
                are the last.
            plan: options of Decoder.

        Returns: token ids, one list a prompt; an empty one where the logits were unusable.
        Raises: as step_logits().
        """
        check_integer("max_new_tokens", max_new_tokens, low=1)
        stop = list(self._folder.eos_token_ids)
        core_plan = self._plan(plan)
        with self._turn, heard(self._core.greedy(core_plan, max_new_tokens, stop)) as generation:
            self._count_sets(generation)
            return [result.token_ids for result in generation.results()]

    def _count_sets(self, generation: _core.Generation) -> None:
        counts = [result.sets for result in generation.results()]
        self._sets = (sum(sets for sets, _ in counts), sum(positions for _, positions in counts))

    @property
    def mean_set_size(self) -> float:
        """Positions of a set, on average over the sparse steps of the last call; 0 if none was."""
        num_sets, num_positions = self._sets
        return num_positions / num_sets if num_sets else 0.0

    def close(self) -> None:
        """Gives the pages back; those of a call that another thread runs when that ends."""
        self._core.close()

    def _plan(self, options: dict[str, Any]) -> _core.PlanConfig:
        asked = PlanConfig(**{k: v for k, v in options.items() if k != "attention"})
        attention = options.get("attention", "auto")
        check_setting("attention", attention)
        if (asked, attention) not in self._plans:
            plan = choose_plan(asked, attention, self._folder)
            self._plans[asked, attention] = core_plan(plan)
        return self._plans[asked, attention]
