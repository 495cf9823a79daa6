"""What a model thinks before it answers, told apart from the answer: <think>...</think>.

Works on a whole text and on one that comes in pieces; both give the same. No character is lost or
doubled: reasoning and content are the text without its two tags.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidaldecode.text.harmony import CHANNEL, MESSAGE, START, writes_harmony
from tidaldecode.text.markers import beginning_at_end


@dataclass(frozen=True)
class ReasoningTags:
    """What stands around a model's reasoning.

    Args:
        begin: in front of it.
        end: behind it.
        next: between that and what follows, where something must stand there.
        answer: in front of what follows, whether there was reasoning or not.
    """

    begin: str
    end: str
    next: str = ""
    answer: str = ""


THINK = ReasoningTags("<think>", "</think>")
# Mistral's models that reason; there the tags are special tokens.
BRACKETS = ReasoningTags("[THINK]", "[/THINK]")
# gpt-oss: a message in a channel of its own (harmony.py reads those).
ANALYSIS = ReasoningTags(
    f"{CHANNEL}analysis{MESSAGE}", "<|end|>",
    next=f"{START}assistant", answer=f"{CHANNEL}final{MESSAGE}",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A text, or a piece of one, in its two parts."""

    reasoning: str = ""
    content: str = ""


def find_reasoning_tags(chat_template: str | None) -> ReasoningTags | None:
    """The tags that a chat template writes or looks for; None if the model does not reason.

    Some templates only open the reasoning, in the prompt; others only take it out of old answers.
    """
    if chat_template is None:
        return None
    if writes_harmony(chat_template):
        return ANALYSIS
    for tags in (THINK, BRACKETS):
        if tags.begin in chat_template or tags.end in chat_template:
            return tags
    return None


def opens_reasoning(prompt_end: str, tags: ReasoningTags = THINK) -> bool:
    """Whether a prompt, special tokens shown, ends with an open tag: the answer begins inside."""
    return prompt_end.rstrip().endswith(tags.begin)


class ReasoningSplitter:
    """Takes an answer piece by piece, and gives out each part as soon as it is certain.

    Reasoning stands at the beginning of an answer: tags behind any other text are content. What is
    never closed is reasoning to the end.
    """

    def __init__(self, tags: ReasoningTags = THINK, *, begins_inside: bool = False) -> None:
        """Begins an answer; begins_inside: the prompt has opened the reasoning already."""
        self._tags = tags
        self._is_inside = begins_inside
        self._is_at_start = True  # nothing but space so far: the begin tag may come
        self._held = ""  # taken in, not given out: may be the beginning of a tag

    @property
    def is_inside(self) -> bool:
        """Whether what comes next is reasoning, as far as is known."""
        return self._is_inside

    def push(self, piece: str) -> Parts:
        """Adds text; returns what is certain now."""
        text, self._held = self._held + piece, ""
        before = ""
        if self._is_at_start:
            begin = self._tags.begin
            start = len(text) - len(text.lstrip())
            rest = text[start:]
            if len(rest) < len(begin) and begin.startswith(rest):
                self._held = text
                return Parts()
            self._is_at_start = False
            if rest.startswith(begin):
                before, text = text[:start], rest[len(begin) :]
                if self._is_inside:
                    before, text = "", before + text
                self._is_inside = True
        if not self._is_inside:
            return Parts(content=text)
        reasoning, content = self._split(text)
        return Parts(reasoning=reasoning, content=before + content)

    def finish(self) -> Parts:
        """Ends the answer; returns what was held back."""
        rest, self._held = self._held, ""
        return Parts(reasoning=rest) if self._is_inside else Parts(content=rest)

    def _split(self, text: str) -> tuple[str, str]:
        """Reasoning up to its end, if that is here, and content behind it."""
        end = self._tags.end
        reasoning, found, content = text.partition(end)
        if found:
            self._is_inside = False
            return reasoning, content
        keep = len(text) - beginning_at_end(text, end)
        self._held = text[keep:]
        return text[:keep], ""


def split_reasoning(
    text: str, tags: ReasoningTags = THINK, *, begins_inside: bool = False
) -> Parts:
    """A whole answer in its two parts, as ReasoningSplitter tells them apart."""
    splitter = ReasoningSplitter(tags, begins_inside=begins_inside)
    first, rest = splitter.push(text), splitter.finish()
    return Parts(reasoning=first.reasoning + rest.reasoning, content=first.content + rest.content)
