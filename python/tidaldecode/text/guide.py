"""What a generated text must be: JSON of a schema, a regular expression's text, a grammar's.

guiding.py makes the engine keep to it, with llguidance (extra "structured").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tidaldecode.errors import InvalidArgument, show
from tidaldecode.text.chat import check_text, plain_data
from tidaldecode.text.reasoning import ReasoningTags

# llguidance's, of JSON. A model that likes spaces would otherwise never come to an end.
JSON_OPTIONS = {"whitespace_pattern": r" |\n[ \t]{0,40}"}
_MAX_CHARS = 1 << 20
_KINDS = ("json_schema", "regex", "grammar")


@dataclass(frozen=True)
class Guide:
    """What a text must be, from its first character to its last.

    Example:
        >>> schema = {"type": "object", "properties": {"year": {"type": "integer"}}}
        >>> decoder.generate("...", guide=Guide.json_schema(schema), max_new_tokens=100).text

    Only tokens that keep to it are drawn, and tokens that end the text only where it is whole.
    max_new_tokens and stop strings can still cut it. Its methods make one.

    Args:
        kind: "json_schema", "regex" or "grammar".
        source: the schema's JSON, the expression or the grammar.
        reasoning: tags between which the model may reason first; None: it does not.
        begins_inside: the prompt has opened the reasoning, so it does come.

    Raises: InvalidArgument.
    """

    kind: str
    source: str
    reasoning: ReasoningTags | None = None
    begins_inside: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in _KINDS:
            expected = ", ".join(repr(kind) for kind in _KINDS)
            raise InvalidArgument(f"guide: got kind {show(self.kind)}, expected one of {expected}")
        check_text(self.source, f"guide: {self.kind}")
        tags = self.reasoning
        if tags is not None:
            if not isinstance(tags, ReasoningTags):
                raise InvalidArgument(f"guide: tags: got {show(tags)}, expected ReasoningTags")
            for tag in (tags.begin, tags.end):
                if not check_text(tag, "guide: tags"):
                    raise InvalidArgument("guide: tags: got an empty one, expected a text")
        if not isinstance(self.begins_inside, bool):
            raise InvalidArgument(
                f"guide: begins_inside: got {show(self.begins_inside)}, expected True or False"
            )
        if len(self.source) > _MAX_CHARS:
            raise InvalidArgument(
                f"guide: {self.kind}: got {len(self.source)} characters, expected at most "
                f"{_MAX_CHARS}"
            )

    @staticmethod
    def json_schema(schema: Any) -> Guide:
        """JSON of a schema.

        Args:
            schema: a JSON schema as a dictionary or its text, or a pydantic model's class.

        Raises: InvalidArgument for what is none; whether a schema can be kept to is found out when
            it is used.
        """
        maker = getattr(schema, "model_json_schema", None)
        if isinstance(schema, type) and callable(maker):
            schema = maker()
        expected = "guide: json_schema: got {}, expected an object as a dictionary or as JSON"
        if isinstance(schema, str):
            check_text(schema, "guide: json_schema")
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError):
                raise InvalidArgument(expected.format(show(schema))) from None
        if not isinstance(schema, Mapping):
            raise InvalidArgument(expected.format(show(schema)))
        plain = plain_data(schema, "guide: json_schema")
        try:
            return Guide("json_schema", json.dumps(plain, ensure_ascii=False, allow_nan=False))
        except ValueError as cause:  # a NaN
            raise InvalidArgument(f"guide: json_schema: {cause}") from None

    @staticmethod
    def json_object() -> Guide:
        """Any JSON object."""
        return Guide("json_schema", '{"type": "object"}')

    @staticmethod
    def regex(pattern: str) -> Guide:
        """Text that a regular expression matches as a whole.

        Args:
            pattern: the expression, in the syntax of Rust's regex.

        Raises: InvalidArgument for what is no text; whether it can be kept to is found out when it
            is used.
        """
        return Guide("regex", pattern)

    @staticmethod
    def grammar(lark: str) -> Guide:
        """Text of a context-free grammar.

        Args:
            lark: the grammar in llguidance's form of Lark; its first rule is start.

        Raises: as regex().
        """
        return Guide("grammar", lark)

    def after_reasoning(self, tags: ReasoningTags, *, begins_inside: bool = False) -> Guide:
        """The same, for a model that may reason before it answers.

        Args:
            tags: around its reasoning, which is free.
            begins_inside: the prompt has opened the reasoning, so that it only has to be closed.

        Raises: InvalidArgument.
        """
        return replace(self, reasoning=tags, begins_inside=begins_inside)


def check_guide(value: Any) -> Guide | None:
    """`value`, if it is a guide or None.

    Raises: InvalidArgument.
    """
    if value is not None and not isinstance(value, Guide):
        raise InvalidArgument(
            f"guide: got {show(value)}, expected a Guide, as Guide.json_schema({{...}})"
        )
    return value
