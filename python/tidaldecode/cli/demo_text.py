"""The demo's haystack and needle: a long text nobody owns, with one fact hidden in it.

Called by demo.py. The text is put together from the word lists and sentence patterns below, in the
style of software documentation, which the embedded model was trained on. A seed gives the same
text again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

_SUBJECTS = (
    "server", "client", "parser", "scheduler", "compiler", "buffer", "index", "daemon", "filter",
    "module", "library", "package", "driver", "window", "session", "query", "table", "archive",
    "monitor", "terminal", "socket", "cache", "thread", "printer", "database", "editor", "signal",
    "handler", "directory", "device", "protocol", "template", "journal", "mailbox", "cursor",
)  # fmt: skip
_KINDS = (
    "default", "local", "remote", "current", "internal", "external", "primary", "temporary",
    "shared", "static", "dynamic", "previous", "optional", "global", "private", "common",
)  # fmt: skip
_THINGS = (
    "configuration file", "environment variable", "command line option", "return value",
    "file descriptor", "error message", "log file", "search path", "data structure", "time stamp",
    "user name", "host name", "regular expression", "input stream", "output format", "memory pool",
    "version number", "character set", "access control list", "working directory", "lock file",
    "control block", "header field", "symbol table", "network interface", "process group",
)  # fmt: skip
_ACTIONS = (
    "reads", "writes", "updates", "checks", "ignores", "replaces", "returns", "creates", "removes",
    "opens", "closes", "inspects", "copies", "restores", "reports", "keeps", "compares", "loads",
)  # fmt: skip
_INFINITIVES = (
    "read", "write", "update", "check", "replace", "create", "remove", "open", "close", "inspect",
    "copy", "restore", "report", "compare", "load", "install", "configure", "disable", "enable",
)  # fmt: skip
_TIMES = (
    "at startup", "after each request", "before the first call", "when the program exits",
    "once per connection", "while the lock is held", "as soon as the data is ready",
    "every time the file changes", "during installation", "in most cases", "on older systems",
)  # fmt: skip
_REASONS = (
    "because the format is not fixed", "so that other programs can use it",
    "since it may be changed later", "unless another value is given",
    "even if the file does not exist", "although this is rarely needed",
    "which makes it easier to test", "to avoid a second lookup", "if the user has asked for it",
)  # fmt: skip
_PATTERNS = (
    "The {kind} {subject} {action} the {thing} {time}.",
    "If the {thing} is not set, the {subject} {action} the {kind} {thing2}.",
    "You can use this option to {verb} the {thing} of a {kind} {subject}.",
    "Note that the {subject} {action} the {thing} {reason}.",
    "It is possible to {verb} the {thing} {time}, {reason}.",
    "Each {subject} has its own {thing}, and the {kind} {subject2} {action} it {time}.",
    "In order to {verb} the {kind} {subject}, first {verb2} the {thing}.",
    "This function {action} the {thing} and returns a pointer to the {kind} {subject}.",
    "When the {subject} {action} a {thing}, the {subject2} must not {verb} it.",
    "The {thing} of the {kind} {subject} is described in the next section.",
    "For more information about the {thing}, see the manual page of the {subject}.",
    "There is no need to {verb} the {thing} {reason}.",
    "By default, the {subject} {action} the {kind} {thing} {time}.",
    "A {kind} {subject} that {action} the {thing} should also {verb} the {thing2}.",
)
KEY_WORDS = (
    "amber", "anchor", "basil", "beacon", "canyon", "cedar", "cobalt", "copper", "dequeue",
    "ember", "falcon", "fennel", "glacier", "granite", "harbor", "indigo", "juniper", "kestrel",
    "lantern", "maple", "marble", "meadow", "nickel", "onyx", "orchid", "otter", "parity",
    "pebble", "quartz", "raven", "saffron", "sierra", "silver", "spruce", "summit", "thistle",
    "timber", "tundra", "velvet", "walnut", "willow", "zephyr",
)  # fmt: skip
_SENTENCES_PER_PARAGRAPH = (4, 8)
_MIN_TOKENS = 128  # question and needle alone take about 60


@dataclass(frozen=True, kw_only=True)
class HiddenKey:
    """A prompt with a fact in it that the last line asks for."""

    prompt_ids: list[int]
    key: str
    number: str  # the right answer
    needle_start: int  # token position of the sentence that says it
    needle_end: int


def filler_sentence(rng: random.Random) -> str:
    """One sentence of documentation about nothing."""
    return rng.choice(_PATTERNS).format(
        kind=rng.choice(_KINDS),
        subject=rng.choice(_SUBJECTS),
        subject2=rng.choice(_SUBJECTS),
        thing=rng.choice(_THINGS),
        thing2=rng.choice(_THINGS),
        action=rng.choice(_ACTIONS),
        verb=rng.choice(_INFINITIVES),
        verb2=rng.choice(_INFINITIVES),
        time=rng.choice(_TIMES),
        reason=rng.choice(_REASONS),
    )


def hide_key(encode: Callable[[str], list[int]], num_tokens: int, seed: int) -> HiddenKey:
    """Builds a prompt of at most `num_tokens` tokens, and of hardly fewer.

    Args:
        encode: token ids of a text, BOS included.
        num_tokens: length of the prompt, >= 128.
        seed: decides text, key, number and place.

    Returns: the prompt; its needle lies between 10 and 90 percent of the text.
    """
    if num_tokens < _MIN_TOKENS:
        raise ValueError(f"num_tokens: got {num_tokens}, expected at least {_MIN_TOKENS}")
    rng = random.Random(seed)
    first, second = rng.sample(KEY_WORDS, 2)
    key = f"{first}-{second}"
    number = str(rng.randrange(1_000_000, 10_000_000))
    needle = f"The special magic number for {key} is {number}."
    question = f"\nQuestion: What is the special magic number for {key}?\nAnswer:"
    depth = rng.uniform(0.1, 0.9)

    sentences: list[str] = []
    budget = num_tokens  # too much, without needle and question; cut back below
    while budget > 0:
        sentence = sentence_joint(rng, len(sentences)) + filler_sentence(rng)
        sentences.append(sentence)
        budget -= len(encode(sentence)) - 1  # BOS is in every count
    while True:
        place = round(depth * len(sentences))
        before = "".join(sentences[:place])
        with_needle = f"{before} {needle}" if before else needle
        text = with_needle + "".join(sentences[place:]) + question
        ids = encode(text)
        if len(ids) <= num_tokens:
            break
        sentences.pop()
    return HiddenKey(
        prompt_ids=ids,
        key=key,
        number=number,
        needle_start=len(encode(before)),
        needle_end=len(encode(with_needle)),
    )


def sentence_joint(rng: random.Random, index: int) -> str:
    """What stands in front of a sentence: nothing, a space, or now and then a new paragraph."""
    if index == 0:
        return ""
    return "\n\n" if rng.random() < 1 / rng.randint(*_SENTENCES_PER_PARAGRAPH) else " "
