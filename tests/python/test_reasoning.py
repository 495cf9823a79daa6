"""Reasoning and answer told apart: whole, and in pieces of any size."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidaldecode.text.reasoning import (
    BRACKETS,
    THINK,
    Parts,
    ReasoningSplitter,
    find_reasoning_tags,
    opens_reasoning,
    split_reasoning,
)

QWEN3_TEMPLATE = (
    "{%- if message.reasoning_content is string %}{{ '<think>\\n' + reasoning_content + "
    "'\\n</think>\\n\\n' + content }}{% endif %}{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
R1_TEMPLATE = (
    "{% set content = content.split('</think>')[-1] %}{% if add_generation_prompt %}"
    "{{'<|Assistant|><think>\\n'}}{% endif %}"
)
PLAIN_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@st.composite
def chunked_texts(draw, fragments: list[str]) -> list[str]:
    """A text of fragments and of anything else, cut anywhere."""
    text = "".join(draw(st.lists(st.sampled_from(fragments) | st.text(max_size=4), max_size=10)))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def pushed(splitter: ReasoningSplitter, pieces: list[str]) -> Parts:
    parts = [splitter.push(piece) for piece in pieces] + [splitter.finish()]
    return Parts(
        reasoning="".join(part.reasoning for part in parts),
        content="".join(part.content for part in parts),
    )


@pytest.mark.parametrize(
    ("text", "begins_inside", "reasoning", "content"),
    [
        ("<think>\nhm\n</think>\n\nYes", False, "\nhm\n", "\n\nYes"),
        ("\n<think>hm</think>Yes", False, "hm", "\nYes"),
        ("hm</think>Yes", True, "hm", "Yes"),
        ("<think>hm</think>Yes", True, "hm", "Yes"),  # opened twice
        ("\n <think>\nhm</think>Yes", True, "\n \nhm", "Yes"),
        ("Yes", False, "", "Yes"),
        ("  ", False, "", "  "),
        ("", True, "", ""),
        ("<think>never closed </thin", False, "never closed </thin", ""),
        ("<thinking>", False, "", "<thinking>"),
        ("I say <think>no</think>", False, "", "I say <think>no</think>"),
        ("a</think>b", False, "", "a</think>b"),
        ("<think>a</think>b</think><think>c", False, "a", "b</think><think>c"),
        ("<think></think>", False, "", ""),
        ("<thi</think>", True, "<thi", ""),
        ("<<think>a", False, "", "<<think>a"),
        ("a<</think>b", True, "a<", "b"),
    ],
)
def test_the_parts_of_an_answer(text, begins_inside, reasoning, content):
    parts = split_reasoning(text, begins_inside=begins_inside)
    assert parts == Parts(reasoning=reasoning, content=content)
    one_by_one = pushed(ReasoningSplitter(begins_inside=begins_inside), list(text))
    assert one_by_one == parts


@settings(max_examples=500, deadline=None)
@given(
    chunked_texts(["<think>", "</think>", "<th", "ink>", "</", "think", "<", "\n", " "]),
    st.booleans(),
)
def test_pieces_give_what_the_whole_gives_and_nothing_is_lost(pieces, begins_inside):
    text = "".join(pieces)
    parts = pushed(ReasoningSplitter(begins_inside=begins_inside), pieces)
    assert parts == split_reasoning(text, begins_inside=begins_inside)
    # The text is what the two parts are, but for a tag before and a tag behind the reasoning.
    tags = ("", THINK.begin, THINK.end, THINK.begin + THINK.end)
    assert len(text) - len(parts.reasoning + parts.content) in {len(tag) for tag in tags}
    space = text[: len(text) - len(text.lstrip())]
    r, c = parts.reasoning, parts.content
    candidates = {c, f"{r}</think>{c}", r, f"<think>{r}", f"<think>{r}</think>{c}"}
    if begins_inside:  # space before a tag counts as reasoning
        after = r.removeprefix(space)
        candidates |= {f"{space}<think>{after}", f"{space}<think>{after}</think>{c}"}
    else:
        after = c.removeprefix(space)
        candidates |= {f"{space}<think>{r}", f"{space}<think>{r}</think>{after}"}
    assert text in candidates


def test_text_is_given_out_as_soon_as_it_is_certain():
    splitter = ReasoningSplitter()
    assert splitter.push("<thi") == Parts()
    assert splitter.push("nk>a") == Parts(reasoning="a")
    assert splitter.is_inside
    assert splitter.push("b </") == Parts(reasoning="b ")
    assert splitter.push("b> c") == Parts(reasoning="</b> c")
    assert splitter.push("</think>d") == Parts(content="d")
    assert not splitter.is_inside
    assert splitter.push("<think>") == Parts(content="<think>")
    assert splitter.finish() == Parts()


def test_tags_come_from_the_template():
    assert find_reasoning_tags(QWEN3_TEMPLATE) == THINK
    assert find_reasoning_tags(R1_TEMPLATE) == THINK
    assert find_reasoning_tags("{{ '[THINK]' + t + '[/THINK]' }}") == BRACKETS
    assert find_reasoning_tags(PLAIN_TEMPLATE) is None
    assert find_reasoning_tags(None) is None
    parts = split_reasoning("[THINK]a[/THINK]b", BRACKETS)
    assert parts == Parts(reasoning="a", content="b")


def test_prompts_that_open_the_reasoning():
    assert opens_reasoning("<|Assistant|><think>\n")
    assert opens_reasoning("<|im_start|>assistant\n<think>")
    assert not opens_reasoning("<|im_start|>assistant\n")
    assert not opens_reasoning("<think>\n\n</think>\n\n")
    assert opens_reasoning("[THINK]", BRACKETS)
