"""What a call gives back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidaldecode import _core


@dataclass(frozen=True, kw_only=True)
class Timings:
    """How long a sequence took."""

    queue_s: float  # from the start of its call until its prompt began to be read
    time_to_first_token_s: float  # from the start of its call
    decode_tokens_per_s: float  # from the first token to the last; 0 for a single token
    total_s: float


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What verified decoding did for a sequence."""

    drafted_tokens: int  # and checked
    accepted_tokens: int  # of those, kept
    dense_passes: int  # each checked drafts, or was a dense step, and drew one token more
    ngram_tokens: int = 0  # of the drafted_tokens, from the text; the others took sparse steps

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafts that were kept; 0 without drafts."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

    @property
    def tokens_per_dense_pass(self) -> float:
        """Tokens that a dense pass gave, 1 to drafts + 1; 0 without passes."""
        if not self.dense_passes:
            return 0.0
        return (self.accepted_tokens + self.dense_passes) / self.dense_passes


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """What the model held of a token: by the softmax of its logits, before any sampling setting."""

    token_id: int
    logprob: float
    rank: int  # 1: the most likely token, or the first of equals
    top: tuple[tuple[int, float], ...]  # the most likely ids, best first, with theirs


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """One continued prompt."""

    text: str | None  # of the new tokens, cut before what stopped it; None without a tokenizer
    token_ids: tuple[int, ...]  # the new tokens; a stop token is the last of them
    finish_reason: str  # "stop", "length", "abort" or "error"
    stop_reason: str | int | None  # the stop string or token id if finish_reason is "stop"
    prompt_tokens: int  # of a session's turn: all tokens it follows
    timings: Timings
    cached_tokens: int = 0  # of the prompt_tokens, those that were in the cache before
    error: str | None = None  # what went wrong if finish_reason is "error"
    verification: Verification | None = None  # None: nothing was verified
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one a new token, if they were asked for
    # One a token of the prompt but the first, each after those before it, if they were asked for.
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


def token_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[_core.TokenLogprobs]
) -> tuple[TokenLogprobs, ...]:
    """The engine's log-probabilities, with the tokens that they belong to."""
    return tuple(
        TokenLogprobs(
            token_id=token_id,
            logprob=each.logprob,
            rank=each.rank,
            top=tuple(zip(each.top_ids, each.top_logprobs, strict=True)),
        )
        for token_id, each in zip(token_ids, logprobs, strict=False)
    )


def make_result(
    core: _core.SequenceResult,
    *,
    prompt_ids: Sequence[int],
    text: str | None,
    matched_stop: str | None,
    stop_token_ids: Collection[int],
    num_tokens: int | None = None,
) -> GenerationResult:
    """The engine's account of a sequence together with its text.

    Args:
        num_tokens: that the text took, up to the end of its stop string; None: all of them.
    """
    token_ids = tuple(core.token_ids[:num_tokens])
    finish_reason = "stop" if matched_stop is not None else core.finish_reason or "abort"
    stop_reason: str | int | None = matched_stop
    is_stopped = finish_reason == "stop" and stop_reason is None
    if is_stopped and token_ids and token_ids[-1] in stop_token_ids:
        stop_reason = token_ids[-1]
    counts = core.verification
    steps = len(core.token_ids) - 1  # those that the time was for
    return GenerationResult(
        text=text,
        token_ids=token_ids,
        finish_reason=finish_reason,
        stop_reason=stop_reason,
        prompt_tokens=core.prompt_tokens,
        cached_tokens=core.cached_tokens,
        timings=Timings(
            queue_s=core.queue_s,
            time_to_first_token_s=core.time_to_first_token_s,
            decode_tokens_per_s=steps / core.decode_s if steps > 0 and core.decode_s > 0 else 0.0,
            total_s=core.time_to_first_token_s + core.decode_s,
        ),
        error=core.error or None,
        logprobs=token_logprobs(token_ids, core.logprobs) if core.has_logprobs else None,
        prompt_logprobs=token_logprobs(prompt_ids[1:], core.prompt_logprobs)
        if core.has_prompt_logprobs
        else None,
        verification=Verification(
            drafted_tokens=counts.drafted_tokens,
            accepted_tokens=counts.accepted_tokens,
            dense_passes=counts.dense_passes,
            ngram_tokens=counts.ngram_tokens,
        )
        if counts.dense_passes
        else None,
    )
