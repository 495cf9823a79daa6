"""Compiling a chat template in the sandbox that transformers uses; imported with the first chat."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Filters and tests that say that a template looks into content that is a list.
_LIST_FILTERS = {"map", "selectattr", "rejectattr", "select", "reject", "first", "last", "list"}
_LIST_TESTS = {"string", "iterable", "sequence", "mapping"}


@dataclass(frozen=True)
class CompiledTemplate:
    """A template ready to render."""

    render: Callable[..., str]
    variables: frozenset[str]  # names that the template looks up
    reads_parts: bool  # whether it knows content as a list of parts too


@lru_cache(maxsize=8)
def compile_template(text: str) -> CompiledTemplate:
    """Compiles a template; raises jinja2's errors."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    tree = environment.parse(text)
    names = _content_names(tree)
    return CompiledTemplate(
        render=environment.from_string(text).render,
        variables=frozenset(meta.find_undeclared_variables(tree)),
        reads_parts=any(_looks_inside(node, names) for node in _walk(tree)),
    )


class _GenerationBlock(Extension):
    """{% generation %} … {% endgeneration %}: marks what the model wrote; here only its text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.CallBlock:
        """Keeps the body of the block, in a scope of its own as transformers has it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_body"), [], [], body)
        block.set_lineno(line)
        return block

    @staticmethod
    def _body(caller: Callable[[], str]) -> str:
        return caller()


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Dict:
    """dict() for templates, without what the class itself would give away."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """As dict.fromkeys."""
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """namespace() for templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that "self" may be a name
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace: got the name {name!r}")


def _walk(tree: nodes.Node) -> Iterator[nodes.Node]:
    pending = [tree]
    while pending:
        node = pending.pop()
        yield node
        pending += node.iter_child_nodes()


def _content_names(tree: nodes.Node) -> set[str]:
    """Variables that hold a message's content, arguments of macros that are given it included."""
    names = {"content"}
    macros = {node.name: node for node in _walk(tree) if isinstance(node, nodes.Macro)}
    for node in _walk(tree):
        if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
            if _is_content(node.node, names):
                names.add(node.target.name)
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name):
            macro = macros.get(node.node.name)
            for name, value in zip(macro.args if macro else (), node.args, strict=False):
                if _is_content(value, names):
                    names.add(name.name)
    return names


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names


def _looks_inside(node: nodes.Node, names: set[str]) -> bool:
    if isinstance(node, nodes.For):
        return _is_content(node.iter, names)
    if isinstance(node, nodes.Getitem):
        is_slice = isinstance(node.arg, nodes.Slice)
        return _is_content(node.node, names) and not is_slice
    if isinstance(node, nodes.Filter) and node.node is not None:
        return node.name in _LIST_FILTERS and _is_content(node.node, names)
    if isinstance(node, nodes.Test):
        return node.name in _LIST_TESTS and _is_content(node.node, names)
    return False
