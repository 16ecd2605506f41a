"""Whether a template wants message content as text or as parts, as vLLM 0.33 finds out.

A template that loops over a message's content gets a list of parts; any other one
gets a string. vLLM decides that on the template's syntax tree, by the names that
``messages``, its items and their ``content`` travel under; so does this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from jinja2 import nodes

ContentFormat = Literal["string", "openai"]


def detect_content_format(tree: nodes.Template) -> ContentFormat:
    """Return "openai" if a loop runs over message content, else "string"."""
    try:
        found = _loops_over_content(tree)
    except _UnforeseenTargetError:
        return "string"  # vLLM's own default where its search fails
    return "openai" if found else "string"


class _UnforeseenTargetError(Exception):
    """A loop over messages or content binds something else than one name."""


def _loops_over_content(tree: nodes.Template) -> bool:
    items = list(_message_names(tree))

    def is_content(node: nodes.Node) -> bool:
        return any(_reads(node, item, "content") for item in items)

    in_macros: set[int] = set()
    content_parameters: dict[int, set[str]] = {}
    for macro in tree.find_all(nodes.Macro):
        parameters = _content_parameters(tree, macro, is_content)
        for loop in macro.find_all(nodes.For):
            in_macros.add(id(loop))
            if parameters:
                content_parameters[id(loop)] = parameters

    for loop in tree.find_all(nodes.For):
        if is_content(loop.iter):
            _target(loop)
            return True
        if isinstance(loop.iter, nodes.Name):
            name = loop.iter.name
            if name in content_parameters.get(id(loop), ()) or (
                id(loop) not in in_macros and name == "content"
            ):
                _target(loop)
                return True
    return False


def _content_parameters(tree: nodes.Template, macro: nodes.Macro, is_content) -> set[str]:
    """Parameters of the macro that some call fills with a message's content."""
    names = [argument.name for argument in macro.args]
    found: set[str] = set()
    for call in tree.find_all(nodes.Call):
        if not (isinstance(call.node, nodes.Name) and call.node.name == macro.name):
            continue
        found.update(
            name for name, value in zip(names, call.args, strict=False) if is_content(value)
        )
        found.update(
            keyword.key
            for keyword in call.kwargs
            if isinstance(keyword, nodes.Keyword)
            and keyword.key in names
            and is_content(keyword.value)
        )
    return found


def _message_names(tree: nodes.Template) -> Iterator[str]:
    """Names that loops over ``messages``, or over an alias of it, give to its items."""
    aliases = _aliases_of_messages(tree)
    for loop in tree.find_all(nodes.For):
        if any(_reads(loop.iter, alias) for alias in aliases):
            yield _target(loop)


def _aliases_of_messages(tree: nodes.Template) -> list[str]:
    aliases = ["messages"]
    for alias in aliases:  # grows meanwhile
        for assign in tree.find_all(nodes.Assign):
            aliases += [name for name in _assigned(assign, alias) if name not in aliases]
    return aliases


def _assigned(assign: nodes.Assign, alias: str) -> Iterator[str]:
    """Names that the assignment makes further aliases of ``alias``."""
    target, value = assign.target, assign.node
    if isinstance(target, nodes.Name):
        if _reads(value, alias):
            yield target.name
        elif (
            isinstance(value, nodes.Call)
            and isinstance(value.node, nodes.Name)
            and value.node.name == "namespace"
        ):
            for keyword in value.kwargs:
                if isinstance(keyword, nodes.Keyword) and _reads(keyword.value, alias):
                    yield f"{target.name}.{keyword.key}"
    elif isinstance(target, nodes.NSRef) and _reads(value, alias):
        yield f"{target.name}.{target.attr}"


def _reads(node: nodes.Node, name: str, key: str | None = None) -> bool:
    """Whether the expression is the variable, or its ``key``, filtered, tested or sliced."""
    while True:
        if isinstance(node, (nodes.Filter, nodes.Test)):
            if node.node is None:
                return False
            node = node.node
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            node = node.node
        else:
            break
    if key is None:
        return _is_variable(node, name)
    if isinstance(node, nodes.Getitem):
        return (
            _is_variable(node.node, name)
            and isinstance(node.arg, nodes.Const)
            and node.arg.value == key
        )
    return isinstance(node, nodes.Getattr) and node.attr == key and _is_variable(node.node, name)


def _is_variable(node: nodes.Node, name: str) -> bool:
    if isinstance(node, nodes.Name):
        return node.ctx == "load" and node.name == name
    if isinstance(node, nodes.Getattr) and "." in name:
        owner, _, attribute = name.rpartition(".")
        return node.attr == attribute and _is_variable(node.node, owner)
    return False


def _target(loop: nodes.For) -> str:
    if not isinstance(loop.target, nodes.Name):
        raise _UnforeseenTargetError
    return loop.target.name
