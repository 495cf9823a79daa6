"""Chat templates made by a grammar, harmless and hostile, rendered and answered."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from judge import Nonsense
from models import SMALL, VOCAB_SIZE, write_model
from supervisor import TEXT_LIMITS
from tidaldecode import Decoder

LIMITS = TEXT_LIMITS
_ATOMS = (
    "messages", "messages[0]", "messages[0]['content']", "message", "bos_token", "eos_token",
    "add_generation_prompt", "loop.index", "1", "0", "-1", "2 ** 40", "10 ** 30", "'a'", "''",
    "'é'", "[1, 2]", "{'a': 1}", "none", "true", "undefined_name", "namespace(x=1)", "range(5)",
    "range(10 ** 9)", "cycler('a', 'b')", "self", "tools", "strftime_now('%Y')", "raise_exception",
    "'%s'", "'{0}'", "dict", "lipsum", "joiner(',')", "caller", "varargs", "1.5", "1e308 * 10",
)  # fmt: skip
_FILTERS = (
    "length", "upper", "trim", "join(',')", "list", "tojson", "first", "last", "reverse", "sort",
    "string", "int", "float", "abs", "safe", "indent(4)", "batch(2)", "slice(0)", "round", "sum",
    "replace('a', 'aaaa')", "center(10 ** 9)", "wordwrap(1)", "map('upper')", "selectattr('role')",
    "groupby('role')", "attr('__class__')", "random", "xmlattr", "urlize", "pprint", "dictsort",
    "format(1)", "truncate(0)", "filesizeformat", "default('x')", "tojson(indent=10 ** 8)",
    "striptags", "unique", "min", "max", "items", "no_such_filter", "indent(10 ** 9)",
)  # fmt: skip
_OPERATORS = ("+", "-", "*", "**", "/", "//", "%", "~", "==", "<", "and", "or", "in", "is")
_HOSTILE = (
    "{{ (10 ** 100000000) % 7 }}", "{{ 'a' * 10000000000 }}", "{{ [0] * 10 ** 10 }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}", "{{ 9 ** 9 ** 9 }}", "{{ 1 // 0 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(messages) }}{{ messages }}", "{{ '%999999999d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}", "{% set x = namespace(s='a') %}{% for i in range(60) %}"
    "{% set x.s = x.s + x.s %}{% endfor %}{{ x.s }}", "{{ raise_exception('no\\x1b[2J\\n') }}",
    "{% include 'x' %}", "{% import 'os' as os %}{{ os }}", "{% extends 'x' %}", "{{", "{% if %}",
    "{% for %}", "{{ '(' * 5000 }}", "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{{ " + "-" * 3000 + "1 }}", "{% if 1 %}" * 200 + "{% endif %}" * 200, "\ud7ff", "\x00",
    "{{ '\\ud800' }}", "{{ 'abc'.encode('utf-16') }}", "{{ messages.__class__ }}",
    "{{ cycler.__init__.__globals__ }}", "{{ (1).bit_length.__self__ }}", "{{ lipsum(n=10 ** 6) }}",
    "{{ [1] | map('round', 10 ** 8) | list }}", "{% generation %}a{% endgeneration %}",
    "{{ messages | tojson(indent=10 ** 9) }}", "{{ 'a' | center(10 ** 10) }}",
    "{{ range(10 ** 8) | list | length }}", "{{ '<' * 10 ** 6 | int | urlize }}",
    "{% break %}", "{% for m in messages %}{% break %}{% endfor %}", "{{ 0.1 ** -400 }}",
    "{% do messages.clear() %}", "{% set messages = 3 %}{{ messages }}", "{{ caller() }}",
    "{% call m() %}{% endcall %}", "{% filter upper %}a{% endfilter %}", "{# " + "a" * 100_000,
    "{% raw %}{{{% endraw %}", "{{ 'a'.join(['b'] * 10 ** 8) }}", "{{ 'a'.zfill(10 ** 10) }}",
    "{{ 'x'.ljust(10 ** 10) }}", "{{ ('a' * 10 ** 5).replace('', 'b' * 10 ** 5) }}",
    "{{ '1' * 100000 | int }}", "{{ ('9' * 10 ** 6) | int }}", "{{ (10 ** 10 ** 5) | string }}",
)  # fmt: skip
_MESSAGES = (
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "{{ 7 * 7 }}"}],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}],
    [{"role": "no such role", "content": "é\x00\u2028<s></s>"}],
    [{"role": "user", "content": "a" * 2000}],
)


def prepare(workspace: Path) -> None:
    """Writes the whole folder."""
    write_model(workspace / "model")


def make_case(rng: random.Random) -> dict[str, Any]:
    """{"template": text, "messages": list}."""
    if rng.random() < 0.35:
        template = rng.choice(_HOSTILE)
    else:
        template = "".join(_statement(rng, 3) for _ in range(rng.randint(1, 4)))
    return {"template": template, "messages": rng.choice(_MESSAGES)}


def _expression(rng: random.Random, depth: int) -> str:
    if depth <= 0 or rng.random() < 0.3:
        return rng.choice(_ATOMS)
    draw = rng.random()
    inner = _expression(rng, depth - 1)
    if draw < 0.35:
        return f"{inner} | {rng.choice(_FILTERS)}"
    if draw < 0.6:
        return f"({inner}) {rng.choice(_OPERATORS)} ({_expression(rng, depth - 1)})"
    if draw < 0.75:
        return f"({inner})[{_expression(rng, depth - 1)}]"
    if draw < 0.85:
        name = rng.choice(("items", "strip", "split", "format", "__init__", "append", "update"))
        return f"({inner}).{name}({rng.choice(_ATOMS)})"
    return f"{inner} if {_expression(rng, depth - 1)} else {rng.choice(_ATOMS)}"


def _statement(rng: random.Random, depth: int) -> str:
    draw = rng.random()
    value = _expression(rng, depth)
    if depth <= 0 or draw < 0.4:
        return "{{ " + value + " }}"
    body = _statement(rng, depth - 1)
    if draw < 0.65:
        return "{% for message in " + value + " %}" + body + "{% endfor %}"
    if draw < 0.8:
        return "{% if " + value + " %}" + body + "{% else %}b{% endif %}"
    if draw < 0.9:
        return "{% set x = " + value + " %}" + body
    return "text" + body


def describe(case: dict[str, Any]) -> str:
    """The case for a reader."""
    template = case["template"]
    shown = template if len(template) <= 300 else f"{template[:300]}... ({len(template)} letters)"
    return f"chat_template.jinja: {shown!r}, messages {json.dumps(case['messages'])[:120]}"


def group(case: dict[str, Any]) -> str:
    """What a fault of this case is filed under."""
    return "template"


def smaller(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The case with less of its template."""
    parts = case["template"].replace("}{", "}\n{").split("\n")
    for index in range(len(parts) if len(parts) > 1 else 0):
        yield {**case, "template": "".join(parts[:index] + parts[index + 1 :])}


def run_case(case: dict[str, Any], workspace: Path) -> None:
    """Renders the conversation and lets the model answer."""
    with tempfile.TemporaryDirectory(dir=workspace) as name:
        folder = Path(name) / "model"
        shutil.copytree(workspace / "model", folder)
        text = case["template"].encode("utf-8", "surrogatepass")
        (folder / "chat_template.jinja").write_bytes(text)
        with Decoder(folder, **SMALL) as decoder:
            ids = decoder.render_chat(case["messages"])
            if not all(type(i) is int and 0 <= i < VOCAB_SIZE for i in ids):
                raise Nonsense("token ids beyond the vocabulary")
            decoder.chat(case["messages"], max_new_tokens=1)
