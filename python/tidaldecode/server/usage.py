"""What answers have cost: OpenAI's usage, and what only this engine can say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tidaldecode.config import PlanConfig, plan_part
from tidaldecode.plan_bytes import kv_bytes_per_step, most_positions
from tidaldecode.results import GenerationResult

if TYPE_CHECKING:
    from tidaldecode.decoder import Decoder
    from tidaldecode.server.asking import Asked


class Accounts:
    """Counts what the answers to one request cost."""

    def __init__(self, decoder: Decoder, asked: Asked) -> None:
        """Takes the decoder that answers, and what it was asked for."""
        config = decoder.config
        self._model = decoder.model
        self._kv_dtype = config.kv_dtype
        is_dense = asked.options.get("attention", config.attention) == "full"
        plan = plan_part(config)
        if (budget := asked.options.get("token_budget")) is not None:
            plan = plan_part(plan, token_budget=budget, min_token_budget=None)
        self._plan = PlanConfig() if is_dense or not plan.choosing_layers else plan
        self._asked = asked

    @property
    def may_choose(self) -> bool:
        """Whether there are layers that choose what the others read."""
        return bool(self._plan.choosing_layers)

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return kv_bytes_per_step(self._model, PlanConfig(), 1, self._kv_dtype)

    def usage(self, results: Sequence[GenerationResult]) -> dict[str, Any]:
        """The usage of answers that have ended, the n of a prompt beside each other."""
        firsts = results[:: self._asked.n]
        wants_tokens = self._asked.max_tokens != 0
        prompt = sum(result.prompt_tokens for result in firsts)
        completion = sum(len(result.token_ids) for result in results) if wants_tokens else 0
        usage = counts(prompt, completion)
        usage["prompt_tokens_details"] = {
            "cached_tokens": sum(result.cached_tokens for result in firsts)
        }
        usage["completion_tokens_details"] = {"reasoning_tokens": 0}
        usage["tidaldecode"] = self._ours(results)
        return usage

    def bytes_read(self, results: Sequence[GenerationResult]) -> int:
        """Keys and values that the answers' steps have read."""
        return sum(self._bytes_read(result) for result in results)

    def _ours(self, results: Sequence[GenerationResult]) -> dict[str, Any]:
        checks = [result.verification for result in results if result.verification is not None]
        ours: dict[str, Any] = {
            "attention": "tidal" if self.may_choose else "full",
            "kv_bytes_read": self.bytes_read(results),
            # By the engine's clock: what a client hears may be bundled on its way.
            "time_to_first_token_s": results[0].timings.time_to_first_token_s,
            "decode_tokens_per_s": _mean_speed(results),
        }
        if checks:
            drafted = sum(check.drafted_tokens for check in checks)
            accepted = sum(check.accepted_tokens for check in checks)
            ours |= {
                "attention": "verified",
                "drafted_tokens": drafted,
                "ngram_tokens": sum(check.ngram_tokens for check in checks),
                "accepted_tokens": accepted,
                "acceptance_rate": round(accepted / drafted, 4) if drafted else 0.0,
                "dense_passes": sum(check.dense_passes for check in checks),
            }
        return ours

    def _bytes_read(self, result: GenerationResult) -> int:
        """Keys and values that the answer's steps have read, as plan_bytes.py counts them."""
        first, count = result.prompt_tokens, len(result.token_ids) - 1
        if count <= 0:
            return 0
        checks = result.verification
        if checks is None:
            return self._between(self._plan, first + 1, first + count)
        # Drafts and checks are spread evenly over the lengths the answer had.
        dense = self._between(PlanConfig(), first + 1, first + count) / count
        sparse = self._between(self._plan, first + 1, first + count) / count
        sparse_steps = checks.drafted_tokens - checks.ngram_tokens
        return round(checks.dense_passes * dense + sparse_steps * sparse)

    def _between(self, plan: PlanConfig, first: int, last: int) -> int:
        """Bytes of one step at each length from the first to the last."""

        def bytes_at(seq_len: int) -> int:
            return kv_bytes_per_step(self._model, plan, seq_len, self._kv_dtype)

        if not plan.choosing_layers:
            return _sum_of_line(bytes_at, first, last)
        # Up to some length all is read; from there on the bytes grow along another line.
        least = plan.sparse_min_context if isinstance(plan.sparse_min_context, int) else 0
        bend = max(most_positions(plan), least)
        if plan.granularity == "head":  # heads may choose the same, until there is enough for all
            bend = max(bend, most_positions(plan) * self._model.group_size)
        dense = self._between(PlanConfig(), first, min(last, bend)) if first <= bend else 0
        return dense + (_sum_of_line(bytes_at, max(first, bend + 1), last) if last > bend else 0)


def counts(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """The three numbers that every usage has."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _mean_speed(results: Sequence[GenerationResult]) -> float:
    """Tokens a second of one answer, over the steps of all; 0.0 without steps."""
    num_steps = [max(len(result.token_ids) - 1, 0) for result in results]
    speeds = [result.timings.decode_tokens_per_s for result in results]
    taken_s = sum(steps / speed for steps, speed in zip(num_steps, speeds, strict=True) if speed)
    return sum(num_steps) / taken_s if taken_s else 0.0


def _sum_of_line(value: Callable[[int], int], first: int, last: int) -> int:
    """The sum of a linear function over whole numbers."""
    return (value(first) + value(last)) * (last - first + 1) // 2 if first <= last else 0
