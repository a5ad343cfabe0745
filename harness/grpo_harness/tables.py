"""A table of `pyproject.toml`, or of the command line, as a checked model.

A message about a wrong key or value derives from the model: its fields, types and descriptions.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import UNSET, UnsetType

from grpo_harness.errors import HarnessError
from grpo_harness.text import escape

Model = TypeVar("Model", bound=msgspec.Struct)

_KINDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text that is not empty",
    bool: "true or false",
}


class SettingsError(HarnessError):
    """A setting cannot be used. One line: which, where it is set, and what it may be."""


def converted(
    given: Mapping[str, Any], model: type[Model], where: Callable[[list[str]], str]
) -> Model:
    """Convert what was given to a model. Raises ``SettingsError`` with the first wrong key.

    ``where`` returns the beginning of its message from the path of the key.
    """
    try:
        return msgspec.convert(given, model)
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at `$")
        # `$.sampling.top_p`, or `$.tasks[0]` of an element
        path = re.findall(r"[A-Za-z_]\w*", at)
    if unknown := re.search(r"unknown field `(.*)`", message, re.DOTALL):
        fields = _at(model, path).__struct_fields__
        close = difflib.get_close_matches(unknown[1], fields, 1)
        hint = f": did you mean {close[0]}?" if close else f"; it has {', '.join(fields)}"
        raise SettingsError(f"{where([*path, ''])}has no key '{escape(unknown[1])}'{hint}")
    if not message.startswith(("Expected", "Invalid")):  # of the model itself, or a missing key
        raise SettingsError(f"{where([*path, ''])}{message}")
    value: Any = given
    for part in path:
        value = value.get(part, UNSET) if isinstance(value, dict) else value
    if isinstance(value, UnsetType) or not path:
        raise SettingsError(f"{where(path)}{message}")
    raise SettingsError(
        f"{where(path)}{path[-1]} is {escape(repr(value))}: it must be {_description(model, path)}"
    )


def _at(model: type[msgspec.Struct], path: list[str]) -> type[msgspec.Struct]:
    """Return the model of a table within a table."""
    for name in path:
        model = next(k for k in _kinds(model, name) if _is_model(k))
    return model


def _kinds(model: type[msgspec.Struct], name: str) -> tuple[Any, ...]:
    """Return the types of a field: the one that it is declared as, or those of a union."""
    kind = get_args(get_type_hints(model, include_extras=True)[name])[0]
    return (kind, *get_args(kind))


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _description(model: type[msgspec.Struct], path: list[str]) -> str:
    model = _at(model, path[:-1])
    meta = get_args(get_type_hints(model, include_extras=True)[path[-1]])[1]
    for kind in _kinds(model, path[-1]):
        if _is_model(kind):
            return f"a table ({meta.description})"
        if kind in _KINDS:
            return f"{_KINDS[kind]} ({meta.description})"
    return str(meta.description)  # a choice or a list: the description is complete
