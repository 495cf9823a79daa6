"""Chat templates: where a folder keeps them, and rendering them as transformers does.

The sandbox, its filters and functions, and the rules about messages are those of transformers 5
(utils/chat_template_utils.py), so that a template gives the same text here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .errors import TextError
from .files import read_json, read_text

if TYPE_CHECKING:
    from .sandbox import CompiledTemplate

Conversation = list[dict[str, Any]]

_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
# Names under which messages carry what the model thought; the first is the one templates read.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplates:
    """The templates of a folder by name; a single one is "default"."""

    def __init__(self, folder: str, config: dict[str, Any], tokens: dict[str, str]) -> None:
        """Reads them; what is wrong with a template is an error when it is used.

        Args:
            folder: absolute path.
            config: tokenizer_config.json.
            tokens: the named special tokens, which templates see.
        """
        self._tokens = tokens
        self._error: TextError | None = None
        self._texts: dict[str, str] = {}
        try:
            self._texts = _read_files(folder) or _read_field(config) or _read_legacy(folder)
        except TextError as cause:
            self._error = cause
        except OSError as cause:  # a dangling link, a folder that may not be listed
            self._error = TextError("failed", str(cause))

    @property
    def exists(self) -> bool:
        """True if the folder defines how a conversation becomes a prompt."""
        return bool(self._texts) or self._error is not None

    @property
    def with_tools(self) -> str | None:
        """The template that conversations with tools go through, to be looked at."""
        text = self._texts.get("tool_use", self._texts.get("default"))
        return None if text is None else text.encode(errors="replace").decode()

    def render(
        self,
        conversations: Sequence[Conversation],
        *,
        template: str | None,
        variables: dict[str, Any],
        **options: Any,
    ) -> list[str]:
        """The text of each conversation.

        Args:
            conversations: messages each.
            template: a name of the folder's templates, or a template; None is the default one.
            variables: what the template sees besides the messages.
            options: tools, documents, add_generation_prompt and continue_final_message.
        """
        text = self._choose(template, options["tools"])
        from .sandbox import compile_template

        compiled = compile_template(text)
        unknown = [name for name in variables if name not in compiled.variables]
        if unknown:
            raise TextError(
                "refused",
                f"{unknown[0]}: is neither a setting nor a variable that the chat template uses",
            )
        return [
            _render(compiled, text, conversation, self._tokens | variables, **options)
            for conversation in conversations
        ]

    def _choose(self, asked: str | None, tools: Any) -> str:
        if asked is not None:
            if asked in self._texts:
                return self._texts[asked]
            if "{{" not in asked and "{%" not in asked:
                known = ", ".join(sorted(self._texts)) or "none"
                raise TextError(
                    "refused",
                    f"chat_template: got {asked[:60]!a}, expected a template or the name of one "
                    f"in the folder: {known}",
                )
            return asked
        if self._error is not None:
            raise self._error
        name = "tool_use" if tools is not None and "tool_use" in self._texts else "default"
        if name not in self._texts:
            raise TextError(
                "refused",
                "chat_template: got none, expected the name of one, for the folder has no default "
                f"one: {', '.join(sorted(self._texts))}",
            )
        return self._texts[name]


def _read_files(folder: str) -> dict[str, str]:
    """chat_template.jinja and additional_chat_templates/NAME.jinja."""
    texts = {}
    main = os.path.join(folder, "chat_template.jinja")
    if os.path.lexists(main):
        texts["default"] = read_text(main)
    more = os.path.join(folder, "additional_chat_templates")
    for name in sorted(os.listdir(more)) if os.path.isdir(more) else ():
        if name.endswith(".jinja"):
            texts[name.removesuffix(".jinja")] = read_text(os.path.join(more, name))
    return texts


def _read_field(config: dict[str, Any]) -> dict[str, str]:
    """The field of tokenizer_config.json: a template, or a list of named ones."""
    value = config.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    texts = {"default": value} if isinstance(value, str) else value
    if not isinstance(texts, dict) or not all(
        isinstance(part, str) for entry in texts.items() for part in entry
    ):
        raise TextError("failed", "chat_template: expected a template, or a list of named ones")
    return texts


def _read_legacy(folder: str) -> dict[str, str]:
    """chat_template.json, as processors once wrote it."""
    return _read_field(read_json(os.path.join(folder, "chat_template.json")))


def _render(
    compiled: CompiledTemplate,
    text: str,
    conversation: Conversation,
    variables: dict[str, Any],
    *,
    tools: list[Any] | None,
    documents: list[Any] | None,
    add_generation_prompt: bool,
    continue_final_message: bool | str,
) -> str:
    messages = [_with_reasoning(message) for message in conversation]
    if not compiled.reads_parts:
        messages = [_with_joined_parts(message) for message in messages]
    final = None
    if continue_final_message:
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        final = _mark_end(messages, field, text)
    rendered = compiled.render(
        messages=messages,
        tools=tools,
        documents=documents,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    return rendered if final is None else _cut_at_mark(rendered, final)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    found = (message[name] for name in _REASONING if message.get(name) is not None)
    reasoning = next(found, None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _with_joined_parts(message: dict[str, Any]) -> dict[str, Any]:
    """A message for a template that knows content as a string only."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [part if isinstance(part, str) else str(part.get("text", "")) for part in content]
    return message | {"content": "\n".join(texts)}


def _mark_end(messages: Conversation, field: str, template: str) -> str:
    """Puts a mark behind the text that the model is to go on with; returns the text."""
    message = messages[-1] = dict(messages[-1])
    value = message.get(field)
    if value is None:
        raise TextError("refused", f"continue_final_message: the last message has no {field!r}")
    fields = [field]
    if field in _REASONING:
        fields = [name for name in _REASONING if message.get(name) == value]
    if not any(name in template for name in fields):
        raise TextError("refused", f"continue_final_message: the template reads no {field!r}")
    if isinstance(value, list):
        parts = message[field] = [dict(p) if isinstance(p, dict) else p for p in value]
        for part in reversed(parts):
            if isinstance(part, dict) and "text" in part:
                text: str = part["text"]
                part["text"] = text + _TAG
                return text
        raise TextError("refused", "continue_final_message: the last message has no text")
    whole: str = value
    for name in fields:
        message[name] = whole + _TAG
    return whole


def _cut_at_mark(rendered: str, final: str) -> str:
    tag = _TAG.strip()
    if final.strip() not in rendered or tag not in rendered:
        raise TextError(
            "refused", "continue_final_message: the template does not show the last message whole"
        )
    at = rendered.rindex(tag)
    keeps_spaces = rendered[at : at + len(_TAG)] == _TAG
    return rendered[:at] if keeps_spaces else rendered[:at].rstrip()
