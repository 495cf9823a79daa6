"""Between a caller's words and the engine's: prompts to token ids, settings to parameters.

Made by decoder.py and used by its sessions too. The folder's tokenizer is read while the weights
are; what is wrong with it is an error when text is wanted, and not before: ids need none.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

from tidaldecode.batch import MakeText
from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.config import DecodeConfig
from tidaldecode.errors import InvalidArgument, TidalError
from tidaldecode.sampling import SamplingOptions, SamplingSettings, check_bool, check_sampling
from tidaldecode.text.detokenizer import TextAssembler
from tidaldecode.text.prompts import encode_prompts
from tidaldecode.text.text_process import TextProcess
from tidaldecode.text.tokenizer import Tokenizer, start_tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tidaldecode import _core
    from tidaldecode.results import GenerationResult
    from tidaldecode.text.guiding import GuidedCall, GuideWorker

_logger = logging.getLogger("tidaldecode")

Messages = Sequence[Any]  # {"role": ..., "content": ...} each, or a list of such conversations
Prompt = str | Sequence[int] | Mapping[str, Any]  # a mapping holds input_ids


class Frontend:
    """A model folder's text side, with the settings of a decoder."""

    def __init__(self, folder: ModelFolder, settings: DecodeConfig) -> None:
        """Starts reading the folder's tokenizer; finish_loading() waits for it."""
        self._folder = folder
        self._settings = settings
        self._process: TextProcess | None = None
        self._tokenizer: Tokenizer | None = None
        self._problem: TidalError | None = None
        self._has_hinted = False
        self._guides: GuideWorker | None = None  # from the first guided call on
        self._guide_lock = threading.Lock()
        try:
            self._process = start_tokenizer(folder.path)
        except TidalError as cause:
            self._problem = cause

    def finish_loading(self) -> None:
        """Waits for the tokenizer; one that cannot be used is named in the log."""
        if self._process is not None:
            try:
                self._tokenizer = Tokenizer(
                    self._folder.path, self._folder.model.vocab_size, self._process
                )
            except TidalError as cause:
                self._problem = cause
        if self._problem is not None and Tokenizer.exists(self._folder.path):
            _logger.warning("%s; token ids work, text does not", self._problem)

    def close(self) -> None:
        """Ends the process that handles text; text is an error afterwards."""
        if self._process is not None:
            self._process.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises: ConfigError if the folder has none that can be used."""
        if self._tokenizer is None:
            # A fresh one, for an error that is raised twice grows its traceback.
            problem = self._problem
            assert problem is not None, "it is why there is no tokenizer"
            raise type(problem)(str(problem)) from problem
        return self._tokenizer

    def check_sampling(self, **sampling: Unpack[SamplingOptions]) -> SamplingSettings:
        """The settings of a call, with the model's defaults.

        Raises: InvalidArgument naming the setting; TypeError for one that does not exist.
        """
        try:
            settings = check_sampling(
                defaults=self._folder.generation,
                eos_token_ids=self._folder.eos_token_ids,
                vocab_size=self._folder.model.vocab_size,
                encode_word=self._encode_word,
                **sampling,
            )
        except TypeError as cause:  # an unknown setting, named by Python
            raise TypeError(str(cause).replace("check_sampling()", "sampling settings")) from None
        if self._settings.verify == "greedy" and settings.temperature > 0:
            raise InvalidArgument(
                f"temperature: got {settings.temperature}, expected 0 with verify='greedy'; "
                "verify=True keeps sampled text too"
            )
        return settings

    def guided_call(self, settings: SamplingSettings, core: _core.Decoder) -> GuidedCall | None:
        """What the requests of a call follow, if it has a guide.

        Raises: InvalidArgument for a guide that cannot be kept to; UnsupportedError without
            llguidance; ConfigError without a tokenizer.
        """
        if settings.guide is None:
            return None
        from tidaldecode.text.guiding import Ends, GuideWorker, Vocabulary  # numpy among them

        with self._guide_lock:
            if self._guides is None:
                text = self.tokenizer.tokenizer_json()
                vocabulary = Vocabulary(text, self._folder.model.vocab_size)
                self._guides = GuideWorker(core.guide_desk(), vocabulary)
        ends = Ends(settings.stop_token_ids, self._folder.eos_token_ids)
        return self._guides.open(settings.guide, ends)

    def _encode_word(self, word: str) -> list[list[int]]:
        """The tokens of a word in the midst of a text: glued to others, and after a space."""
        word = word.lstrip(" ") or word
        return [self.tokenizer.encode_following(prefix + word) for prefix in ("", " ")]

    def encode_prompts(
        self, prompt: Any, add_special_tokens: bool = True
    ) -> tuple[list[list[int]], bool]:
        """Token ids per prompt, and whether `prompt` is a list of prompts."""
        add_special_tokens = check_bool("add_special_tokens", add_special_tokens)

        def encode(texts: list[str]) -> list[list[int]]:
            return self.tokenizer.encode_texts(texts, add_special_tokens=add_special_tokens)

        return encode_prompts(prompt, encode, self._folder.model.vocab_size)

    def encode_prompt(
        self, prompt: Prompt, *, follows: bool = False, add_special_tokens: bool = True
    ) -> list[int]:
        """Token ids of one prompt; `follows` others: a text gets nothing put in front of it.

        Raises: InvalidArgument.
        """
        check_bool("add_special_tokens", add_special_tokens)

        def encode(texts: list[str]) -> list[list[int]]:
            if follows:
                return [self.tokenizer.encode_following(text) for text in texts]
            return self.tokenizer.encode_texts(texts, add_special_tokens=add_special_tokens)

        prompts, is_batch = encode_prompts(prompt, encode, self._folder.model.vocab_size)
        if is_batch:
            raise InvalidArgument(
                f"prompt: got {len(prompts)} prompts, expected one; use generate() of a Decoder "
                "for several"
            )
        return prompts[0]

    def render_chat(self, messages: Messages, **options: Any) -> Any:
        """Token ids of a conversation, up to where the model's answer begins; of several, lists."""
        return self.tokenizer.render_chat(messages, **options)

    def render_one_chat(self, messages: Messages, **options: Any) -> list[int]:
        """render_chat() where only one conversation will do."""
        ids = self.render_chat(messages, **options)
        if isinstance(ids[0], list):
            raise InvalidArgument(
                f"messages: got {len(ids)} conversations, expected one; use chat() of a Decoder "
                "for several"
            )
        one: list[int] = ids
        return one

    @overload
    def text_maker(self, settings: SamplingSettings, *, needed: Literal[True]) -> MakeText: ...
    @overload
    def text_maker(self, settings: SamplingSettings, *, needed: bool) -> MakeText | None: ...
    def text_maker(self, settings: SamplingSettings, *, needed: bool) -> MakeText | None:
        """What turns a call's new tokens into text; None if there is no tokenizer and no need."""
        if self._tokenizer is None and not (needed or settings.stop):
            return None
        return partial(TextAssembler, self.tokenizer, settings=settings)

    def hint_at_chat(self, result: GenerationResult) -> None:
        """Says once that a model that answers a plain text with nothing may want a conversation."""
        ends_at_once = result.text == "" and result.stop_reason in self._folder.eos_token_ids
        if self._has_hinted or not (ends_at_once and self.tokenizer.has_chat_template):
            return
        self._has_hinted = True
        _logger.warning(
            "the model ended its text at once; it has a chat template: ask it with chat(), or "
            "generate --chat on the command line"
        )


def split_options(options: Mapping[str, Any]) -> tuple[SamplingOptions, dict[str, Any]]:
    """The options of a chat: sampling settings, and what its template is given."""
    names = SamplingOptions.__annotations__
    sampling = {name: value for name, value in options.items() if name in names}
    return sampling, {k: v for k, v in options.items() if k not in names}  # type: ignore
