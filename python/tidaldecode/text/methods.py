"""The methods of a Decoder that are about text alone: conversations, and text to ids and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tidaldecode.sampling import check_bool
from tidaldecode.text.frontend import Frontend, Messages, split_options

if TYPE_CHECKING:
    from tidaldecode import _core
    from tidaldecode.batch import PrefillProgress, ShouldStop
    from tidaldecode.results import GenerationResult
    from tidaldecode.stream import TextStream


class TextMethods:
    """Part of Decoder, which brings what is named first."""

    _frontend: Frontend
    _open_core: Callable[[], _core.Decoder]
    generate: Callable[..., GenerationResult | list[GenerationResult]]
    stream: Callable[..., TextStream]

    def chat(
        self,
        messages: Messages,
        *,
        on_prefill: PrefillProgress | None = None,
        should_stop: ShouldStop | None = None,
        **options: Any,
    ) -> GenerationResult | list[GenerationResult]:
        """The model's answer to a conversation, through the folder's chat template.

        Args:
            messages: {"role": "user", "content": "..."} each; content may be text parts, or null
                beside tool_calls. A list of conversations is a batch.
            on_prefill: as in generate().
            should_stop: as in generate().
            options: the settings of generate() and the options of render_chat().

        Returns: the answer, or a list of answers for a list of conversations.
        Raises: ConfigError if the folder has no chat template; else as generate().
        """
        sampling, chat = split_options(options)
        ids = self.render_chat(messages, **chat)
        return self.generate(ids, on_prefill=on_prefill, should_stop=should_stop, **sampling)

    def chat_stream(
        self,
        messages: Messages,
        *,
        on_prefill: PrefillProgress | None = None,
        should_stop: ShouldStop | None = None,
        **options: Any,
    ) -> TextStream:
        """chat() of one conversation, as pieces of text while they come."""
        self._open_core()
        sampling, chat = split_options(options)
        ids = self._frontend.render_one_chat(messages, **chat)
        return self.stream(ids, on_prefill=on_prefill, should_stop=should_stop, **sampling)

    def render_chat(self, messages: Messages, **options: Any) -> list[int] | list[list[int]]:
        """Token ids of a conversation, up to where the model's answer begins.

        Args:
            messages: as in chat().
            options: tools (functions or JSON schemas), documents, chat_template (a template or the
                name of one of the folder's), add_generation_prompt (False: no answer is begun),
                continue_final_message (True: the last message goes on), and any variable that the
                template uses (enable_thinking=False).

        Returns: the ids, or a list of them for a list of conversations.
        Raises: InvalidArgument for messages or options that are wrong; ConfigError for a template
            that is missing, fails, or takes too long or too much memory.
        """
        self._open_core()
        ids: list[int] | list[list[int]] = self._frontend.render_chat(messages, **options)
        return ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt.

        Args:
            text: the prompt.
            add_special_tokens: False puts nothing (no BOS) around it.

        Raises: InvalidArgument for what is no text; ConfigError if the folder has no tokenizer.
        """
        self._open_core()
        check_bool("add_special_tokens", add_special_tokens)
        return self._frontend.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids.

        Args:
            token_ids: a list, range or array of them.
            skip_special_tokens: False shows special tokens.

        Raises: InvalidArgument for what are no ids; ConfigError if the folder has no tokenizer.
        """
        self._open_core()
        check_bool("skip_special_tokens", skip_special_tokens)
        tokenizer = self._frontend.tokenizer
        return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
