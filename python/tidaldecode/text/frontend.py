"""Between a caller's words and the engine's: prompts to token ids, settings to parameters.

Made by decoder.py and used by its sessions too. The tokenizer is loaded when text is first met.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tidaldecode.batch import Decode
from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.config import DecodeConfig
from tidaldecode.errors import InvalidArgument
from tidaldecode.sampling import SamplingSettings, check_sampling
from tidaldecode.text.prompts import encode_prompts
from tidaldecode.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tidaldecode.sampling import SamplingOptions

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int]


class Frontend:
    """A model folder's text side, with the settings of a decoder."""

    def __init__(self, folder: ModelFolder, settings: DecodeConfig) -> None:
        self._folder = folder
        self._settings = settings
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises: ConfigError if the folder has none that can be used."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._folder.path, self._folder.model.vocab_size)
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

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with what the model wants in front of it (BOS)."""
        return self.tokenizer.encode(text)

    def encode_prompts(self, prompt: Any) -> tuple[list[list[int]], bool]:
        """Token ids per prompt, and whether `prompt` is a list of prompts."""
        return encode_prompts(prompt, self.encode, self._folder.model.vocab_size)

    def encode_prompt(self, prompt: Prompt, *, follows: bool = False) -> list[int]:
        """Token ids of one prompt; `follows` others: a text gets nothing put in front of it.

        Raises: InvalidArgument.
        """

        def encode(text: str) -> list[int]:
            return self.tokenizer.encode(text, add_special_tokens=not follows)

        prompts, is_batch = encode_prompts(prompt, encode, self._folder.model.vocab_size)
        if is_batch:
            raise InvalidArgument(
                f"prompt: got {len(prompts)} prompts, expected one; use generate() of a Decoder "
                "for several"
            )
        return prompts[0]

    def render_chat(self, messages: Messages) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins."""
        return self.tokenizer.render_chat(messages)

    def decode_function(self, *, needed: bool) -> Decode | None:
        """What turns ids into text; None if the folder has no tokenizer and none is needed."""
        if needed or Tokenizer.exists(self._folder.path):
            return self.tokenizer.decode
        return None
