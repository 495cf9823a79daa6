"""The C++ engine (cpp/include/tidal), as python/bindings show it. Internal to the package."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

class RopeConfig:
    type: str
    theta: float
    rotary_dim: int
    interleaved: bool
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    attention_factor: float | None
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float
    truncate: bool
    query_scale_beta: float
    short_factor: list[float]
    long_factor: list[float]
    def __init__(self) -> None: ...

class LayerConfig:
    has_rope: bool
    window: int
    has_experts: bool
    k_scale: float
    v_scale: float
    def __init__(self) -> None: ...

class ModelConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    input_norms: bool
    branch_norms: bool
    qk_norm: bool
    wide_qk_norm: bool
    norm_offset: float
    activation: str
    swiglu_limit: float
    swiglu_alpha: float
    num_experts: int
    experts_per_token: int
    expert_intermediate_size: int
    router_score: str
    router_correction: bool
    normalized_routing: bool
    routing_scale: float
    shared_expert_size: int
    shared_expert_gate: bool
    attention_sinks: bool
    tie_word_embeddings: bool
    embedding_scale: float
    residual_scale: float
    attention_scale: float
    logit_scale: float
    attention_softcap: float
    logit_softcap: float
    rope: RopeConfig
    window_rope: RopeConfig | None
    layers: list[LayerConfig]
    def __init__(self) -> None: ...

AUTOMATIC: int  # a token_budget or sparse_min_context that the engine chooses
# What an automatic token_budget means.
AUTOMATIC_BUDGET: int
MAX_LOGIT_BIAS: float  # of either sign
MAX_LOGIT_BIASES: int
MAX_PENALTY: float  # of frequency and presence, of either sign
MAX_REPETITION_PENALTY: float  # and at least 1 / it
AUTOMATIC_MASS: float
AUTOMATIC_MIN_BUDGET: int

class PlanConfig:
    select_layers: list[int]
    scored_layers: list[int]
    full_layers: int
    token_budget: int
    top_p_mass: float
    min_token_budget: int
    granularity: str
    pooling: str
    shadow: str
    sink_tokens: int
    recent_tokens: int
    sparse_min_context: int
    correction_interval: int

class DecodeConfig(PlanConfig):
    device: str
    dtype: str
    kv_dtype: str
    weight_format: str
    lm_head_format: str
    activation_format: str
    verify: bool
    drafts: str
    draft_tokens: int
    max_seq_len: int
    max_batch_size: int
    page_size: int
    num_pages: int
    gpu_memory_utilization: float
    host_kv_gib: float
    prefix_cache: bool
    prefill_chunk: int
    max_chunk_ms: float
    decode_share: float
    cuda_graphs: bool
    batch_invariant: bool
    num_threads: int
    def __init__(self) -> None: ...

class SamplingParams:
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int
    stop_token_ids: list[int]
    min_new_tokens: int
    no_repeat_ngram_size: int
    logit_bias: dict[int, float]
    suppress_tokens: list[int]
    bad_words: list[list[int]]
    allowed_token_ids: list[int]
    guide: int
    def __init__(self) -> None: ...

class WeightFileEntry:
    def __init__(
        self,
        name: str,
        dtype: str,
        shape: list[int],
        path: str | bytes,
        file_offset: int,
        identity: tuple[int, int, int, int],  # device, inode, size and mtime_ns of the file
        strides: list[int],  # in elements; empty: one behind the other
        stored_name: str,  # in its file, for messages; "": the same
    ) -> None: ...

class QuantizedWeight:
    def __init__(
        self,
        name: str,
        shape: list[int],
        format: str,
        block: tuple[int, int],
        codes: WeightFileEntry,
        scales: WeightFileEntry,
        zeros: WeightFileEntry | None,
        zero_offset: int,
        quantizes_inputs: bool,
        input_scale: WeightFileEntry | None,
        stored_name: str,
    ) -> None: ...

class Verification:
    @property
    def drafted_tokens(self) -> int: ...
    @property
    def ngram_tokens(self) -> int: ...
    @property
    def accepted_tokens(self) -> int: ...
    @property
    def dense_passes(self) -> int: ...

class TokenLogprobs:
    @property
    def logprob(self) -> float: ...
    @property
    def rank(self) -> int: ...
    @property
    def top_ids(self) -> list[int]: ...
    @property
    def top_logprobs(self) -> list[float]: ...

class SequenceResult:
    @property
    def logprobs(self) -> list[TokenLogprobs]: ...
    @property
    def prompt_logprobs(self) -> list[TokenLogprobs]: ...
    @property
    def has_logprobs(self) -> bool: ...
    @property
    def has_prompt_logprobs(self) -> bool: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def error(self) -> str: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def queue_s(self) -> float: ...
    @property
    def time_to_first_token_s(self) -> float: ...
    @property
    def decode_s(self) -> float: ...
    @property
    def verification(self) -> Verification: ...
    @property
    def sets(self) -> tuple[int, int]: ...  # of a replay's sparse steps: sets, positions in all

class Generation:
    def advance(self, timeout_s: float = 0.1) -> list[tuple[int, int]]: ...
    def status(self, sequence: int) -> str: ...
    def selection(self, sequence: int) -> dict[int, npt.NDArray[np.int32]]: ...
    def notify_at(self, event_fd: int) -> bool: ...
    def logprobs(self, sequence: int, first: int) -> list[TokenLogprobs]: ...
    # [1, rows * vocab_size]
    def take_logits(self, sequence: int) -> npt.NDArray[np.float32]: ...
    @property
    def has_news(self) -> bool: ...
    def forget_fd(self, event_fd: int) -> None: ...
    def stop(self, sequence: int, reason: str = "stop") -> None: ...
    def results(self) -> list[SequenceResult]: ...
    def close(self) -> None: ...
    @property
    def done(self) -> bool: ...
    @property
    def prefill_progress(self) -> tuple[int, int]: ...

class Inbox:
    def add(self, generation: Generation, key: int) -> bool: ...  # False: it is closed
    def remove(self, generation: Generation) -> None: ...
    def take(self) -> list[tuple[int, list[int], bool]]: ...  # as Letter in tidal/decoder.h
    def close(self) -> None: ...

class Session:
    def append(self, token_ids: list[int]) -> Generation: ...
    def start(
        self, token_ids: list[int], params: SamplingParams, keep: int | None = None
    ) -> Generation: ...
    def truncate(self, length: int) -> None: ...
    def fork(self) -> Session: ...
    def token_ids(self) -> list[int]: ...
    def num_cached(self) -> int: ...
    def most_tokens(self, keep: int, adds: bool) -> int: ...
    def close(self) -> None: ...
    @property
    def max_seq_len(self) -> int: ...

class GuideDesk:
    def wait(  # at most a second
        self, timeout_s: float = 0.1
    ) -> list[tuple[int, int, int, int, list[int], bool]]: ...  # as GuideQuestion in tidal/guide.h
    def answer(
        self,
        answers: list[tuple[int, int, bytes, bool, str]],  # as GuideAnswer
    ) -> None: ...
    def close(self) -> None: ...
    @property
    def is_closed(self) -> bool: ...

class Replay:
    def read(self) -> Generation: ...
    def step_logits(self, plan: PlanConfig, continuations: list[list[int]]) -> Generation: ...
    def greedy(
        self, plan: PlanConfig, max_new_tokens: int, stop_token_ids: list[int]
    ) -> Generation: ...
    def close(self) -> None: ...

class Decoder:
    def __init__(
        self,
        model: ModelConfig,
        config: DecodeConfig,
        weights: Sequence[WeightFileEntry | QuantizedWeight] | None,  # None: random ones
        progress: Callable[[int, int], None] | None = None,
    ) -> None: ...
    def close(self) -> None: ...
    def start(
        self,
        prompts: list[list[int]],
        params: list[SamplingParams],
        plan: PlanConfig | None = None,
        verify: bool | None = None,
        priority: int = 0,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        cache_salt: str = "",
        max_unread: int = 0,
    ) -> Generation: ...
    def score(self, token_ids: list[int], num_prefill: int, num_logits: int) -> Generation: ...
    def start_session(self, max_seq_len: int) -> Session: ...
    def open_inbox(self, event_fd: int) -> Inbox: ...
    def guide_desk(self) -> GuideDesk: ...
    def start_replay(self, prompts: list[list[int]], max_new_tokens: int) -> Replay: ...
    def measure_steps(
        self, seq_lens: list[int], steps: int, warmup: int, attention: str = "auto"
    ) -> list[float]: ...
    def selection(self, sequence: int) -> dict[int, npt.NDArray[np.int32]]: ...
    @property
    def rounding_errors(self) -> dict[str, float]: ...
    def memory_plan(self) -> dict[str, Any]: ...
    @property
    def plan(self) -> str: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def config(self) -> DecodeConfig: ...
    @property
    def num_free_pages(self) -> int: ...
    def stats(self) -> dict[str, Any]: ...

def plan_memory(
    model: ModelConfig,
    config: DecodeConfig,
    weights: Sequence[WeightFileEntry | QuantizedWeight] | None,
) -> dict[str, Any]: ...
def read_weights(
    weights: Sequence[WeightFileEntry | QuantizedWeight],
) -> dict[str, npt.NDArray[np.float32]]: ...
def list_devices() -> list[dict[str, Any]]: ...
def list_libraries() -> list[tuple[str, str]]: ...
def version() -> str: ...
def cuda_build() -> str: ...
