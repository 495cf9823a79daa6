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
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tidaldecode import _core
from tidaldecode.batch import (
    Callbacks,
    PrefillProgress,
    ShouldStop,
    make_requests,
    note_other_rotation,
    run_generation,
    start_wave,
)
from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.checkpoint.model_folder import ModelFolder, at_revision, read_model_folder
from tidaldecode.config import DecodeConfig
from tidaldecode.engine_config import config_in_use, core_config, core_model, core_weights
from tidaldecode.errors import ConfigError, InvalidArgument
from tidaldecode.memory_plan import MemoryPlan
from tidaldecode.plans import choose_plan, log_plan_notes
from tidaldecode.replay import Replay
from tidaldecode.results import GenerationResult
from tidaldecode.room import Room, UnstartedGeneration
from tidaldecode.sampling import SamplingOptions, check_callback, check_choice, check_integer
from tidaldecode.session import Session, SessionHost
from tidaldecode.stream import TextStream
from tidaldecode.text.frontend import Frontend, Prompt
from tidaldecode.text.methods import TextMethods
from tidaldecode.text.prompts import check_token_ids

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Unpack

LoadProgress = Callable[[int, int], None]
_MAX_MEASURED_STEPS = 1_000_000


class Decoder(TextMethods):
    """A language model on a device.

    Example:
        >>> decoder = Decoder("path/to/model")
        >>> decoder.generate("The capital of France is", max_new_tokens=8).text

    Args:
        model_dir: a Hugging Face model folder (llama, mistral, qwen2, qwen3; safetensors), or a hub
            id as "org/name": from the hub's cache here, or downloaded (extra "hf").
        revision: branch, tag or commit of a hub id; also as "org/name@revision".
        config: all settings as one value, instead of the keyword options.
        progress: called with (bytes done, bytes in all) while the weights are loaded.
        options: the fields of DecodeConfig, where each is explained; None takes the value of the
            model's plan if one is used, and else the engine's default.

    A folder's tokenizer is read here too. Where it has none, or one that cannot be used (the log
    says why), token ids work as prompts and what needs text is a ConfigError.

    Raises:
        ConfigError: the folder's configuration or an option is impossible or not supported.
        WeightsError: weights are missing, damaged or of the wrong shape.
        UnsupportedError: the device is not there, or does not do this model.
        OutOfMemoryError: the model or its cache does not fit; known before anything is loaded.
        BackendError: the device failed.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: str = "auto",
        kv_dtype: str = "auto",
        load_format: str = "auto",
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
        draft_tokens: int | str | None = None,
        max_seq_len: int | None = None,
        max_batch_size: int | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        gpu_memory_utilization: float | None = None,
        prefill_chunk: int | None = None,
        cuda_graphs: bool | None = None,
        num_threads: int | None = None,
        revision: str | None = None,
        config: DecodeConfig | None = None,
        progress: LoadProgress | None = None,
    ) -> None:
        given = locals()
        options = {field.name: given[field.name] for field in fields(DecodeConfig)}
        settings = _one_config(config, options)
        folder = read_model_folder(at_revision(model_dir, revision), settings.load_format)
        folder.log_notes(settings.max_seq_len)
        plan = choose_plan(settings, settings.attention, folder)
        log_plan_notes(settings, plan, folder)
        self._settings, self._folder = settings, folder
        self._plan_source = plan.description if plan else "dense"
        self._frontend, self._room = Frontend(folder, settings), Room()
        # What holds pages, and ends with the decoder.
        self._holders: weakref.WeakSet[TextStream | Replay | Session] = weakref.WeakSet()
        self._core: _core.Decoder | None = None
        try:
            self._core = _core.Decoder(
                core_model(folder.model),
                core_config(settings, plan, folder),
                core_weights(folder),
                check_callback("progress", progress, 2),
            )
            self._frontend.finish_loading()
        except BaseException:
            self._frontend.close()
            raise

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
        add_special_tokens: bool = True,
        on_prefill: PrefillProgress | None = None,
        should_stop: ShouldStop | None = None,
    ) -> GenerationResult | list[GenerationResult]:
        """Continues one prompt or several.

        Settings left at None come from the model's generation_config.json; without one decoding is
        greedy, of at most 256 tokens. More prompts than fit at once run in waves. Where other
        threads hold the rows or pages, the call waits for them.

        Args:
            prompt: a text, token ids (a list, range or array of any library; what a transformers
                tokenizer gives, its padding left out), or a list of those (a batch).
            max_new_tokens: most tokens to generate, >= 1. A given number must fit behind the
                prompt; the default shrinks to the room there is.
            temperature: 0 is greedy (the highest logit, the lower id on ties), >= 0.
            top_k: keep the k most likely tokens; 0 or -1 is off.
            top_p: keep the most likely tokens up to this probability, in (0, 1].
            min_p: drop tokens less likely than this share of the most likely one, in [0, 1].
            repetition_penalty: > 0; 1 is off. Counts tokens of prompt and output.
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
            add_special_tokens: False puts nothing (no BOS) around texts.
            on_prefill: called with (tokens done, tokens in all) while prompts are read.
            should_stop: asked before every chunk of a prompt and every decode step; True ends the
                call with what there is (finish_reason "abort").

        Returns: a GenerationResult, or a list of them for a list of prompts.
        Raises:
            InvalidArgument: a prompt or setting is wrong; the message names it.
            CapacityError: a prompt with its new tokens does not fit, also beside what streams of
                this thread and sessions hold.
        """
        given = locals()
        sampling: Any = {name: given[name] for name in SamplingOptions.__annotations__}
        core = self._open_core()
        callbacks = Callbacks(on_prefill, should_stop)
        settings = self._frontend.check_sampling(**sampling)
        prompts, is_batch = self._frontend.encode_prompts(prompt, add_special_tokens)
        make_text = self._frontend.text_maker(settings, needed=False)
        results: list[GenerationResult] = []
        requests = make_requests(prompts, settings, core, self._room)
        note_other_rotation(requests, self.model)
        while rest := requests[len(results) :]:
            begin = partial(start_wave, rest, core)
            with self._room.started(begin, callbacks, self._room.turn) as started:
                wave, generation = started or (rest, UnstartedGeneration(rest))
                results += run_generation(generation, wave, make_text, callbacks)
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
        prompt_ids = self._frontend.encode_prompt(prompt, add_special_tokens=add_special_tokens)
        make_text = self._frontend.text_maker(settings, needed=True)
        requests = make_requests([prompt_ids], settings, core, self._room)
        note_other_rotation(requests, self.model)
        started = self._room.stream(partial(start_wave, requests, core), callbacks)
        generation = started[1] if started else UnstartedGeneration(requests)
        stream = TextStream(generation, requests[0], make_text([prompt_ids]), callbacks)
        self._holders.add(stream)
        return stream

    def session(self, *, max_seq_len: int | None = None) -> Session:
        """A conversation whose tokens stay in the cache from one turn to the next.

        Args:
            max_seq_len: most tokens it may grow to; None is the decoder's. Rotary types that
                depend on length (dynamic, longrope) use the frequencies of this one.

        Raises: InvalidArgument; CapacityError for more than the decoder's max_seq_len.
        """
        core = self._open_core()
        most = 0 if max_seq_len is None else check_integer("max_seq_len", max_seq_len, low=1)
        host = SessionHost(core, self._frontend, self._room, self._holders)
        return Session(core.start_session(most), host)

    # Looking inside

    def selection(self, sequence: int = 0) -> dict[int, np.ndarray]:
        """The positions each select layer chose in its last sparse step.

        Args:
            sequence: index into the prompts of the last call (of its last wave; 0 for a session's
                turn).

        Returns: {layer: [num_sets, num_selected] int32, ascending per set}; num_sets is the number
            of KV heads, query heads or 1, by granularity. Sets that are smaller than the largest
            (an adaptive budget) end in -1. Empty if there was no sparse step.
        """
        return self._open_core().selection(check_integer("sequence", sequence, low=0))

    def logits(self, token_ids: Sequence[int], last: int = 1) -> np.ndarray:
        """Logits of the last positions after dense prefill: [last, vocab_size] float32."""
        core = self._open_core()
        last = check_integer("last", last, low=1)
        return core.prefill_logits(self._checked_ids(token_ids), last)

    def step_logits(self, token_ids: Sequence[int], prefill: int) -> np.ndarray:
        """Logits of decode steps over given tokens (teacher forcing).

        Prefills the first `prefill` ids densely and feeds the others one step at a time through
        the plan.

        Returns: [len(token_ids) - prefill + 1, vocab_size] float32; row i follows
            prefill + i ids.
        """
        core = self._open_core()
        prefill = check_integer("prefill", prefill, low=1)
        return core.decode_logits(self._checked_ids(token_ids), prefill)

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

        Raises: InvalidArgument; CapacityError if the prompts do not fit.
        """
        core = self._open_core()
        check_callback("on_prefill", on_prefill, 2)
        ids, _ = self._frontend.encode_prompts(prompts)
        room = check_integer("max_new_tokens", max_new_tokens, low=1)
        with self._room.turn:
            replay = Replay(core.start_replay(ids, room), self._folder, self._room.turn)
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
        with self._room.turn:
            return core.measure_steps(lengths, steps, warmup, attention)

    @property
    def plan(self) -> str:
        """One letter per layer: F full, S select, s sparse ("FFSssSss")."""
        return self._open_core().plan

    @property
    def plan_source(self) -> str:
        """Where the plan comes from: a file, the user's cache, the table of published plans (and
        whether it has been measured here), the caller, or "dense"."""
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
        """KV pages that neither a running sequence nor a session holds."""
        return self._open_core().num_free_pages

    def memory_plan(self) -> MemoryPlan:
        """What the decoder takes of its device, by purpose: planned before it was allocated, and
        not exceeded afterwards. print() shows it as a table."""
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

    def __enter__(self) -> Decoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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

    def _checked_ids(self, token_ids: Sequence[int]) -> list[int]:
        return check_token_ids(token_ids, self._folder.model.vocab_size)


def _one_config(config: DecodeConfig | None, options: dict[str, Any]) -> DecodeConfig:
    """The keyword options as a DecodeConfig, or the one that was given."""
    if config is None:
        return DecodeConfig(**options)
    if not isinstance(config, DecodeConfig):
        raise ConfigError(f"config: got a {type(config).__name__}, expected a DecodeConfig")
    defaults = {field.name: field.default for field in fields(DecodeConfig)}
    both = [name for name, value in options.items() if not _is_default(value, defaults[name])]
    if both:
        raise ConfigError(
            f"config: given together with {', '.join(both)}; expected one of the two ways"
        )
    return config


def _is_default(value: Any, default: Any) -> bool:
    """Whether nothing was given; the defaults are words and None."""
    return value is default or (isinstance(value, str) and value == default)
