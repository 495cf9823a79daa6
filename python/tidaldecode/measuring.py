"""The methods of a Decoder that look inside: chosen positions, logits, plans compared, times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tidaldecode.batch import heard
from tidaldecode.replay import Replay
from tidaldecode.sampling import check_callback, check_choice, check_integer
from tidaldecode.text.frontend import Frontend
from tidaldecode.text.prompts import check_token_ids

if TYPE_CHECKING:
    import weakref

    import numpy as np

    from tidaldecode import _core
    from tidaldecode.batch import PrefillProgress
    from tidaldecode.checkpoint.model_folder import ModelFolder

_MAX_MEASURED_STEPS = 1_000_000


class MeasuringMethods:
    """Part of Decoder, which brings what is named first."""

    _frontend: Frontend
    _folder: ModelFolder
    _holders: weakref.WeakSet[Any]
    _open_core: Callable[[], _core.Decoder]

    def selection(self, sequence: int = 0) -> dict[int, np.ndarray]:
        """The positions that each layer which chooses took in its last sparse step.

        Args:
            sequence: index into the prompts of the last call (0 for a session's turn).

        Returns: {layer: [num_sets, num_selected] int32, ascending per set}; num_sets is the number
            of KV heads, query heads or 1, by granularity. Sets that are smaller than the largest
            (an adaptive budget) end in -1. Empty if there was no sparse step, or if the call still
            runs and others have stepped since.
        Raises: InvalidArgument for an index of no prompt.
        """
        return self._open_core().selection(check_integer("sequence", sequence, low=0))

    def logits(self, token_ids: Sequence[int], last: int = 1) -> np.ndarray:
        """Logits of the last positions after dense prefill.

        A request beside others; its tokens are read by themselves, whatever else runs.

        Args:
            token_ids: tokens of one sequence.
            last: positions at its end, 1 to len(token_ids).

        Returns: [last, vocab_size] float32.
        Raises: InvalidArgument; CapacityError if the tokens do not fit, also beside what sessions
            and replays hold.
        """
        self._open_core()
        last = check_integer("last", last, low=1)
        ids = self._checked_ids(token_ids)
        check_integer("last", last, low=1, high=max(len(ids), 1))
        return self._score(ids, len(ids), last)

    def step_logits(self, token_ids: Sequence[int], prefill: int) -> np.ndarray:
        """Logits of decode steps over given tokens (teacher forcing).

        Steps are shared with other requests: on a GPU they equal those alone to rounding, or
        exactly with batch_invariant.

        Args:
            token_ids: tokens of one sequence.
            prefill: how many of them are read densely, 1 to len(token_ids); the others are fed one
                step at a time through the plan.

        Returns: [len(token_ids) - prefill + 1, vocab_size] float32; row i follows
            prefill + i ids.
        Raises: as logits().
        """
        self._open_core()
        prefill = check_integer("prefill", prefill, low=1)
        ids = self._checked_ids(token_ids)
        check_integer("prefill", prefill, low=1, high=max(len(ids), 1))
        return self._score(ids, prefill, len(ids) - prefill + 1)

    def replay(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        on_prefill: PrefillProgress | None = None,
    ) -> Replay:
        """Reads prompts once, to continue them with one plan after the other.

        Args:
            prompts: texts or lists of token ids, at most max_batch_size of them.
            max_new_tokens: room behind each.
            on_prefill: as in generate().

        Raises: as generate().
        """
        core = self._open_core()
        check_callback("on_prefill", on_prefill, 2)
        ids, _ = self._frontend.encode_prompts(prompts)
        room = check_integer("max_new_tokens", max_new_tokens, low=1)
        replay = Replay(core.start_replay(ids, room), self._folder)
        replay.read(on_prefill)
        self._holders.add(replay)
        return replay

    def measure_steps(
        self,
        context: int,
        batch_size: int = 1,
        *,
        steps: int = 30,
        warmup: int = 5,
        attention: str = "auto",
    ) -> list[float]:
        """Seconds of single decode steps over a full cache; for measuring speed.

        No prompt is read: the cache holds random keys and values. A step is what generate() does
        for every token, from token ids going to the device to their successors coming back, and
        every one is at the same length. The decoder is as before afterwards, its pages free again.

        Args:
            context: tokens of each sequence in the cache, the newest included, from 1 to
                max_seq_len.
            batch_size: sequences that step together.
            steps: how many are timed, at most a million.
            warmup: how many run before, untimed, at most a million.
            attention: "auto" runs the plan that generate() would at this length, "full" the dense
                plan, as a decoder with attention="full" does.

        Returns: seconds of each timed step.
        Raises:
            InvalidArgument: a setting is wrong; the message names it.
            CapacityError: more tokens, rows or pages than the decoder has.
        """
        core = self._open_core()
        lengths = [check_integer("context", context, low=1)]
        lengths *= check_integer("batch_size", batch_size, low=1, high=65535)
        steps = check_integer("steps", steps, low=1, high=_MAX_MEASURED_STEPS)
        warmup = check_integer("warmup", warmup, low=0, high=_MAX_MEASURED_STEPS)
        check_choice("attention", attention, ("auto", "full"))
        return core.measure_steps(lengths, steps, warmup, attention)

    def _score(self, token_ids: list[int], num_prefill: int, num_logits: int) -> np.ndarray:
        core = self._open_core()
        with heard(core.score(token_ids, num_prefill, num_logits)) as generation:
            return generation.take_logits(0).reshape(num_logits, -1)

    def _checked_ids(self, token_ids: Sequence[int]) -> list[int]:
        return check_token_ids(token_ids, self._folder.model.vocab_size)
