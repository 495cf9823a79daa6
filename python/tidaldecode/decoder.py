"""Decoder: a model folder in memory, ready to continue texts. The package's front door.

The walk from model_dir to text: model_folder.py reads the folder, plans.py chooses the layers that
select positions, the C++ engine (cpp/include/tidal/decoder.h) loads the weights and runs every
step; text/ stands between text and token ids (text/methods.py has the methods for conversations);
session.py keeps one. Nothing is computed here.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from tidaldecode import _core
from tidaldecode.batch import (
    Callbacks,
    PrefillProgress,
    ShouldStop,
    make_requests,
    note_other_rotation,
    run_generation,
    start,
)
from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.checkpoint.model_folder import ModelFolder, at_revision, read_model_folder
from tidaldecode.closing import Closing
from tidaldecode.config import DecodeConfig, PlanConfig, one_config
from tidaldecode.engine_config import (
    config_in_use,
    core_config,
    core_model,
    core_weights,
    log_rounding,
    model_in_use,
)
from tidaldecode.errors import InvalidArgument
from tidaldecode.measuring import MeasuringMethods
from tidaldecode.memory_plan import MemoryPlan
from tidaldecode.plan_bytes import log_gain
from tidaldecode.plans import Plan, choose_plan, log_plan_notes
from tidaldecode.replay import Replay
from tidaldecode.requests import MAX_CHOICES, CallOptions, Request
from tidaldecode.results import GenerationResult
from tidaldecode.sampling import SamplingOptions, check_callback, check_integer
from tidaldecode.session import Session, SessionHost
from tidaldecode.stream import TextStream
from tidaldecode.text.frontend import Frontend, Prompt
from tidaldecode.text.guide import Guide
from tidaldecode.text.methods import TextMethods

if TYPE_CHECKING:
    from typing_extensions import Unpack

LoadProgress = Callable[[int, int], None]


class Decoder(TextMethods, MeasuringMethods, Closing):
    """A language model on a device.

    Example:
        >>> decoder = Decoder("path/to/model")
        >>> decoder.generate("The capital of France is", max_new_tokens=8).text

    Args:
        model_dir: a Hugging Face model folder (safetensors) of a family that the guide lists, or a
            hub id as "org/name": from the hub's cache here, or downloaded (extra "hf").
        revision: branch, tag or commit of a hub id; also as "org/name@revision".
        config: all settings as one value, instead of the keyword options.
        progress: called with (bytes done, bytes in all) while the weights are loaded.
        options: the fields of DecodeConfig, where each is explained; None takes the value of the
            model's plan if one is used, and else the engine's default.

    A folder's tokenizer is read here too. Where it has none, or one that cannot be used (the log
    says why), token ids work as prompts and what needs text is a ConfigError.

    Raises:
        ConfigError: the folder's configuration or an option is impossible or not supported.
        InvalidArgument: settings that do not go together; progress cannot be called so.
        WeightsError: weights are missing, damaged or of the wrong shape.
        UnsupportedError: the device does not do this model.
        OutOfMemoryError: the model or its cache does not fit; known before anything is loaded.
        BackendError: the device is not there, or failed.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: str = "auto",
        kv_dtype: str = "auto",
        load_format: str = "auto",
        weight_format: str = "auto",
        lm_head_format: str = "auto",
        activation_format: str = "auto",
        attention: str = "auto",
        token_budget: int | str | None = None,
        top_p_mass: float | None = None,
        min_token_budget: int | None = None,
        select_layers: Sequence[int] | None = None,
        scored_layers: Sequence[int] | None = None,
        full_layers: int | None = None,
        granularity: str | None = None,
        pooling: str | None = None,
        shadow: str | None = None,
        sink_tokens: int | None = None,
        recent_tokens: int | str | None = None,
        sparse_min_context: int | str | None = None,
        correction_interval: int | None = None,
        verify: bool | str | None = None,
        drafts: str | None = None,
        draft_tokens: int | str | None = None,
        max_seq_len: int | None = None,
        max_batch_size: int | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        gpu_memory_utilization: float | None = None,
        host_kv_gib: float | None = None,
        prefix_cache: bool | None = None,
        prefill_chunk: int | None = None,
        max_chunk_ms: float | None = None,
        decode_share: float | None = None,
        cuda_graphs: bool | None = None,
        batch_invariant: bool | None = None,
        num_threads: int | None = None,
        revision: str | None = None,
        config: DecodeConfig | None = None,
        progress: LoadProgress | None = None,
    ) -> None:
        given = locals()
        options = {field.name: given[field.name] for field in fields(DecodeConfig)}
        settings = one_config(config, options)
        folder = read_model_folder(
            at_revision(model_dir, revision), settings.load_format, settings.max_seq_len
        )
        folder.log_notes(settings.max_seq_len)
        plan = choose_plan(settings, settings.attention, folder)
        _log_notes(settings, plan, folder)
        self._settings, self._folder = settings, folder
        self._plan_source = plan.description if plan else "dense"
        self._frontend = Frontend(folder, settings)
        # What holds pages, and ends with the decoder.
        self._holders: weakref.WeakSet[TextStream | Replay | Session] = weakref.WeakSet()
        self._core: _core.Decoder | None = self._load(plan, check_callback("progress", progress, 2))

    def _load(self, plan: Plan | None, progress: LoadProgress | None) -> _core.Decoder:
        """Loads the model while a process beside this one reads the tokenizer."""
        folder = self._folder
        try:
            config = core_config(self._settings, plan, folder)
            model = core_model(model_in_use(folder, config))
            core = _core.Decoder(model, config, core_weights(folder), progress)
            log_rounding(config, core.rounding_errors)
            self._frontend.finish_loading()
        except BaseException:
            self._frontend.close()
            raise
        return core

    # Generation

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        frequency_penalty: float | None = None,
        presence_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        min_new_tokens: int | None = None,
        no_repeat_ngram_size: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        suppress_tokens: Sequence[int] | None = None,
        bad_words: Sequence[str | Sequence[int]] | None = None,
        allowed_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        skip_special_tokens: bool = True,
        include_stop_str_in_output: bool = False,
        guide: Guide | None = None,
        add_special_tokens: bool = True,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        on_prefill: PrefillProgress | None = None,
        should_stop: ShouldStop | None = None,
    ) -> GenerationResult | list[GenerationResult]:
        """Continues one prompt or several.

        What the model's generation_config.json says counts where a setting is None; without one
        decoding is greedy, of at most 256 tokens. Calls of several threads are decoded together;
        prompts that do not fit at once wait in line.

        Args:
            prompt: a text, token ids (a list, range or array of any library; what a transformers
                tokenizer gives, its padding left out), or a list of those (a batch).
            max_new_tokens: most tokens to generate, >= 1. A given number must fit behind the
                prompt; the default shrinks to the room there is.
            temperature: 0 is greedy (the highest logit, the lower id on ties), >= 0.
            top_k: keep the k most likely tokens; 0 or -1 is off.
            top_p: keep the most likely tokens up to this probability, in (0, 1].
            min_p: drop tokens less likely than this share of the most likely one, in [0, 1].
            repetition_penalty: 1e-6 to 1e6; 1 is off. Counts tokens of prompt and output.
            frequency_penalty: taken off a token's logit each time it was generated, in [-2, 2].
            presence_penalty: taken off it once it was generated, in [-2, 2].
            seed: of the draws, in [0, 2**64); None is a fresh one for every sequence.
            stop: strings that end the text; they are cut from it. Special tokens count as written.
            stop_token_ids: ids that end the text, besides the model's own.
            min_new_tokens: before so many, no id that ends the text is drawn; stop strings still
                end it.
            no_repeat_ngram_size: no n tokens in a row occur twice; 0 is off.
            logit_bias: {token id: what is added to its logit, in [-100, 100]}.
            suppress_tokens: ids that are never drawn.
            bad_words: texts or lists of ids that are never completed.
            allowed_token_ids: the only ids that are drawn.
            ignore_eos: go on after the model's end-of-text tokens.
            skip_special_tokens: False shows special tokens in the text.
            include_stop_str_in_output: the text keeps the stop string or token that ended it.
            guide: what the text must be: Guide.json_schema(), json_object(), regex() or grammar().
            add_special_tokens: False puts nothing (no BOS) around texts.
            logprobs: log-probabilities of the new tokens, each with those of so many of the most
                likely, 0 to 20; None is none.
            prompt_logprobs: the same of the prompts' tokens, which are then read whole.
            on_prefill: called with (tokens done, tokens in all) while prompts are read.
            should_stop: asked while the call runs, at least for every token; True ends it with
                what there is (finish_reason "abort").

        Returns: a GenerationResult, or a list of them for a list of prompts.
        Raises:
            InvalidArgument: a prompt or setting is wrong; the message names it.
            ConfigError: the folder has no tokenizer, and a prompt or setting is text.
            CapacityError: a prompt with its new tokens does not fit, also beside what sessions
                hold.
        """
        given = locals()
        sampling: Any = {name: given[name] for name in SamplingOptions.__annotations__}
        core = self._open_core()
        callbacks = Callbacks(on_prefill, should_stop)
        settings = self._frontend.check_sampling(**sampling)
        guide_call = self._frontend.guided_call(settings, core)
        asked = CallOptions(logprobs=logprobs, prompt_logprobs=prompt_logprobs)
        options = asked.for_core(self._settings, self._folder)
        prompts, is_batch = self._frontend.encode_prompts(prompt, add_special_tokens)
        make_text = self._frontend.text_maker(settings, needed=False)
        requests = make_requests(prompts, settings, core, guide_call)
        note_other_rotation(requests, self.model)
        generation = start(requests, core, **options)
        results = run_generation(generation, requests, make_text, callbacks)
        if isinstance(prompt, str):
            self._frontend.hint_at_chat(results[0])
        return results if is_batch else results[0]

    def stream(
        self,
        prompt: Prompt,
        *,
        add_special_tokens: bool = True,
        on_prefill: PrefillProgress | None = None,
        should_stop: ShouldStop | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> TextStream:
        """Continues one prompt; iterate over the result for pieces of text as they come.

        Args:
            prompt: a text or token ids.
            add_special_tokens: as in generate().
            on_prefill: called with (tokens done, tokens in all) while the prompt is read.
            should_stop: as in generate().
            sampling: the settings of generate().

        Raises: as generate(), at the call.
        """
        core = self._open_core()
        hint = self._frontend.hint_at_chat if isinstance(prompt, str) else None
        callbacks = Callbacks(on_prefill, should_stop, hint)
        settings = self._frontend.check_sampling(**sampling)
        guide_call = self._frontend.guided_call(settings, core)
        prompt_ids = self._frontend.encode_prompt(prompt, add_special_tokens=add_special_tokens)
        make_text = self._frontend.text_maker(settings, needed=True)
        requests = make_requests([prompt_ids], settings, core, guide_call)
        note_other_rotation(requests, self.model)
        generation = start(requests, core)
        stream = TextStream(generation, requests[0], make_text([prompt_ids]), callbacks)
        self._holders.add(stream)
        return stream

    def submit(
        self,
        prompt: Prompt,
        *,
        attention: str | None = None,
        plan: PlanConfig | None = None,
        verify: bool | None = None,
        priority: int = 0,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        n: int = 1,
        cache_salt: str = "",
        max_unread: int | None = None,
        add_special_tokens: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> Request:
        """Takes a prompt in and returns at once; the answer comes while others are made.

        Args:
            prompt: a text or token ids.
            attention: "full" decodes this one densely, "tidal" sparsely; None is as the decoder.
            plan: how to decode sparsely, instead of the decoder's plan. Takes memory for its sets
                while the request lives, if no other has the same.
            verify: whether tokens are drafted, and dense passes decide; None is as the decoder.
            priority: requests with lower ones go first.
            logprobs: as in generate().
            prompt_logprobs: as in generate().
            n: answers to the prompt, which is read once if there is a prefix cache:
                Request.choices. With a seed, they are drawn with seed, seed + 1 and so on.
            cache_salt: only requests with the same one find each other's prompts in the prefix
                cache.
            max_unread: with so many new tokens that nobody has read yet it does not go on, and
                others may have its place meanwhile; None is any number.
            add_special_tokens: as in generate().
            sampling: the settings of generate().

        Raises: as generate(), at the call; ConfigError for a plan that does not fit the model,
            OutOfMemoryError for one without room.
        """
        core = self._open_core()
        asked = CallOptions(
            attention=attention, plan=plan, verify=verify, priority=priority,
            logprobs=logprobs, prompt_logprobs=prompt_logprobs, cache_salt=cache_salt,
            max_unread=max_unread,
        )  # fmt: skip
        check_integer("n", n, low=1, high=MAX_CHOICES)
        options = asked.for_core(self._settings, self._folder)
        settings = self._frontend.check_sampling(**sampling)
        guide_call = self._frontend.guided_call(settings, core)
        prompt_ids = self._frontend.encode_prompt(prompt, add_special_tokens=add_special_tokens)
        make_text = self._frontend.text_maker(settings, needed=False)
        parts: list[tuple[TextStream, _core.Generation]] = []
        for index in range(n):
            requests = make_requests([prompt_ids], settings.for_choice(index), core, guide_call)
            if index == 0:
                note_other_rotation(requests, self.model)
            generation = start(requests, core, **options)
            text = make_text([prompt_ids]) if make_text else None
            stream = TextStream(generation, requests[0], text, Callbacks(None, None))
            self._holders.add(stream)
            parts.append((stream, generation))
        return Request(*parts[0], [Request(*part) for part in parts[1:]])

    def session(self, *, max_seq_len: int | None = None) -> Session:
        """A conversation whose tokens stay in the cache from one turn to the next.

        Args:
            max_seq_len: most tokens it may grow to; None is the decoder's. Rotary types that
                depend on length (dynamic, longrope) use the frequencies of this one.

        Raises: InvalidArgument; CapacityError for more than the decoder's max_seq_len.
        """
        core = self._open_core()
        most = 0 if max_seq_len is None else check_integer("max_seq_len", max_seq_len, low=1)
        host = SessionHost(core, self._frontend, self._holders)
        return Session(core.start_session(most), host)

    # What it is

    @property
    def plan(self) -> str:
        """One letter per layer: F full, S select, P scored, s sparse, w window ("FFSssPss")."""
        return self._open_core().plan

    @property
    def plan_source(self) -> str:
        """Where the plan comes from: a file, the user's cache, the table of published plans (and
        whether it has been measured here), the caller, "safe: …" where every layer chooses for
        itself, or "dense"."""
        return self._plan_source

    @property
    def model(self) -> ModelConfig:
        """Shape and settings of the model."""
        return self._folder.model

    @property
    def folder(self) -> ModelFolder:
        """What the model's folder says."""
        return self._folder

    @property
    def config(self) -> DecodeConfig:
        """The settings in use, every automatic one filled in."""
        return config_in_use(self._open_core().config, self._settings)

    @property
    def num_free_pages(self) -> int:
        """KV pages that no sequence, session or replay holds."""
        return self._open_core().num_free_pages

    def stats(self) -> dict[str, Any]:
        """What the decoder is at: requests that wait, read, decode or are paused, pages that are
        free, held or cached; and what it has done since it began: passes by kind and the seconds
        (`..._s`) that they took, tokens, pauses. `gap_s` is from the end of a pass to the
        beginning of the next, where one followed."""
        return self._open_core().stats()

    def memory_plan(self) -> MemoryPlan:
        """What the decoder takes of its device, by purpose: planned before it was allocated, and
        not exceeded afterwards but by plans of requests and replays. print() shows it as a table.
        """
        return MemoryPlan(**self._open_core().memory_plan())

    # Lifetime

    def close(self) -> None:
        """Frees the model and ends its streams and sessions. Any later use is an error.

        A call that another thread runs ends with InvalidArgument at its next step.
        """
        core, self._core = self._core, None
        if core is None:
            return
        core.close()
        with contextlib.suppress(KeyError):  # none left
            while True:
                self._holders.pop().close()
        self._frontend.close()

    def __repr__(self) -> str:
        core = self._core
        if core is None:
            return f"Decoder({str(self._folder.path)!r}, closed)"
        config = core.config
        return (
            f"Decoder({str(self._folder.path)!r}, device={config.device!r}, "
            f"dtype={config.dtype!r}, plan={core.plan!r})"
        )

    # Inner parts

    def _open_core(self) -> _core.Decoder:
        core = self._core
        if core is None:
            raise InvalidArgument("decoder: it is closed; create a new Decoder")
        return core


def _log_notes(settings: DecodeConfig, plan: Plan | None, folder: ModelFolder) -> None:
    """What a user should know at every start."""
    log_plan_notes(settings, plan, folder)
    if plan is None and settings.attention != "full":
        log_gain(folder)
