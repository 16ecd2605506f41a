"""The environment that chat templates see: Jinja's immutable sandbox as transformers sets it up."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SPANS = "generation spans"
"""Variable for the spans of ``{% generation %}``; no template or request can name it."""

_PUBLIC_METHODS = {
    str: frozenset(n for n in dir(str) if n[0] != "_") - {"format", "format_map"},
    dict: frozenset({"items", "keys", "values", "get", "copy", "fromkeys"}),
    list: frozenset({"index", "count", "copy"}),
}
_OF_DICT = frozenset(dir(dict))
_PLAIN = frozenset({str, int, float, bool, list, dict, type(None)})
_ABSENT: Any = object()


class _Namespace(Namespace):
    """``namespace(...)``: refuses private names, which lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]  # so that a template can call namespace(self=...)
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the private name {name!r}")


class _Dict:
    """``dict(...)`` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``: marks what the assistant wrote; the text is unchanged."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: what is set inside does not leak out.
        call = self.call_method("note_span", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def note_span(self, context: Context, caller: Macro) -> str:
        text = caller()
        noting = context.get(SPANS)
        if noting is not None:
            written, spans = noting
            start = sum(map(len, written))
            spans.append((start, start + len(text)))
        return text


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with short ways for plain JSON values.

    Each short way returns what the sandbox would return after its checks: those are
    about names with underscores, mutating methods and ``str.format``, and none of
    the names let through here is one.
    """

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict and attribute not in _OF_DICT:
            value = obj.get(attribute, _ABSENT)
            return self.undefined(obj=obj, name=attribute) if value is _ABSENT else value
        if attribute in _PUBLIC_METHODS.get(kind, ()):
            return getattr(obj, attribute)
        if kind is _Namespace and attribute[0] != "_":
            value = getattr(obj, attribute, _ABSENT)
            if type(value) in _PLAIN:
                return value
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is dict and type(argument) is str and argument not in _OF_DICT:
            value = obj.get(argument, _ABSENT)
            return self.undefined(obj=obj, name=argument) if value is _ABSENT else value
        return super().getitem(obj, argument)

    # The names are Jinja's: it passes the template's own keywords along.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if type(__obj) is BuiltinMethodType and not kwargs:
            return __obj(*args)
        return super().call(__context, __obj, *args, **kwargs)


_encode = json.JSONEncoder(ensure_ascii=False).encode


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON with blanks after separators and no HTML escapes, unlike Jinja's own."""
    if not (ensure_ascii or indent is not None or separators or sort_keys):
        return _encode(value)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def build_environment() -> jinja2.Environment:
    """Return an environment; templates cannot change it, so one serves all."""
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    names: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    environment.globals.update(names)
    return environment
