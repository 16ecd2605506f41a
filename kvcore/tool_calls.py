"""A request's tools and the tool calls in its history, in the form that vLLM hands to templates.

Key order matters here: templates write both out as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kvcore.errors import InvalidFieldError

Json = Any

_TOOL = ("function", "type")
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")


def requested_tools(
    request: Mapping[str, Json], *, exclude_when_none: bool = False
) -> list[dict[str, Json]] | None:
    """Return the request's tools in the form that vLLM hands to templates.

    Raises:
        InvalidFieldError: They are not what OpenAI's API defines.
    """
    tools, choice = request.get("tools"), request.get("tool_choice")
    if tools is None:
        if choice not in (None, "none"):
            raise InvalidFieldError("tool_choice", "needs tools")
        return None
    if not isinstance(tools, list) or not tools:
        raise InvalidFieldError("tools", "must be an array with at least one tool")
    normal = [_normal_tool(tool, f"tools[{at}]") for at, tool in enumerate(tools)]
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if choice.get("type", "function") != "function" or name not in [
            tool["function"]["name"] for tool in normal
        ]:
            raise InvalidFieldError("tool_choice", "names none of the tools")
    elif choice not in (None, "none", "auto", "required"):
        raise InvalidFieldError("tool_choice", 'must be "none", "auto", "required" or a tool')
    return None if choice == "none" and exclude_when_none else normal


def _normal_tool(tool: Json, field: str) -> dict[str, Json]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        raise InvalidFieldError(field, 'must be {"type": "function", "function": {…}}')
    if not isinstance(function.get("name"), str):
        raise InvalidFieldError(f"{field}.function.name", "must be a string")
    for key, kind in (("description", str), ("parameters", Mapping), ("strict", bool)):
        if not isinstance(function.get(key), (kind, type(None))):
            raise InvalidFieldError(f"{field}.function.{key}", "has the wrong type")
    defer = tool.get("defer_loading")
    for key, value in (
        ("function.defer_loading", function.get("defer_loading")),
        ("defer_loading", defer),
    ):
        if not isinstance(value, (bool, type(None))):
            raise InvalidFieldError(f"{field}.{key}", "has the wrong type")
    normal = {key: function.get(key) for key in ("name", "description", "parameters")}
    for key, value in (
        ("strict", function.get("strict")),
        ("defer_loading", function.get("defer_loading", defer)),
    ):
        if value is not None:
            normal[key] = value
    outer = {} if defer is None else {"defer_loading": defer}
    return {"type": "function", "function": normal, **outer}


def developer_tools(tools: Json) -> Json:
    """Return a developer message's tools in the order of OpenAI's schema, where they follow it.

    Others pass as they are: vLLM does not look at them.
    """
    if not isinstance(tools, list) or not all(map(_follows_schema, tools)):
        return tools
    return [
        _reorder({**tool, "function": _reorder(dict(tool["function"]), _FUNCTION_FIELDS)}, _TOOL)
        for tool in tools
    ]


def _follows_schema(tool: Json) -> bool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    return (
        isinstance(function, Mapping)
        and tool.get("type") == "function"
        and isinstance(function.get("name"), str)
        and isinstance(function.get("description", ""), str)
        and isinstance(function.get("parameters", {}), Mapping)
        and isinstance(function.get("strict"), (bool, type(None)))
    )


def history_calls(calls: Json, field: str) -> list[dict[str, Json]]:
    """Return an assistant message's tool calls, their arguments parsed, as templates get them.

    Raises:
        InvalidFieldError: They are not calls of functions; ``field`` is where they are.
    """
    if not isinstance(calls, list):
        raise InvalidFieldError(field, "must be an array")
    prepared = []
    for at, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or call.get("type", "function") != "function":
            raise InvalidFieldError(f"{field}[{at}]", 'must be of type "function"')
        try:
            arguments = _parse_arguments(function.get("arguments"))
        except RecursionError:
            raise InvalidFieldError(
                f"{field}[{at}].function.arguments", "are nested too deep"
            ) from None
        function = _reorder({**function, "arguments": arguments}, ("arguments", "name"))
        prepared.append(_reorder({**call, "function": function}, ("id", "function", "type")))
    return prepared


def _reorder(fields: dict[str, Json], first: tuple[str, ...]) -> dict[str, Json]:
    """Put the fields of OpenAI's schema first, in its order: vLLM's validation does."""
    return {**{key: fields[key] for key in first if key in fields}, **fields}


def _parse_arguments(arguments: Json) -> dict[str, Json]:
    if isinstance(arguments, str) and arguments:
        try:
            arguments = json.loads(arguments)
        except ValueError:
            # A bad call stays in the history for ever; vLLM renders it as one without arguments.
            return {}
    return dict(arguments) if isinstance(arguments, Mapping) else {}
