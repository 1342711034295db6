"""Whether a value of the configuration fits the type that a function or class states for it."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, Union

NUMBER = "a number"
NAMES: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: NUMBER,
    str: "text",
    Path: "text",
    type(None): "null",
}
"""The types that are checked, and what they are called in messages."""
_LISTS = (list, tuple, set, frozenset, Sequence, Collection, Iterable)
_MAPPINGS = (dict, Mapping)
KEYWORDS_OF = {"sim.policies.fixed.fixed": "sim.policies.fixed.static_plan"}
"""Functions that pass all their keywords on, and to which."""


def types_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Return parameter -> type of a function or class; only those that can be read."""
    try:
        hints = typing.get_type_hints(vars(target).get("__init__", target) if isinstance(target, type) else target)
    except (NameError, TypeError, AttributeError):  # a name that only type checkers import
        return {}
    found = {name: hint for name, hint in hints.items() if name in inspect.signature(target).parameters}
    passed_on = KEYWORDS_OF.get(f"{target.__module__}.{target.__qualname__}")
    return found | types_of(resolve_name(passed_on)) if passed_on else found


def fits(value: Any, wanted: Any) -> bool:
    """Return whether a plain value (number, text, list, mapping, None) is of a type; any value fits other types."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if origin in _LISTS:
        return isinstance(value, list) and all(fits(one, inner[0]) for one in value)
    if origin in _MAPPINGS:
        return isinstance(value, Mapping) and all(fits(one, inner[-1]) for one in value.values())
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is Path:
        return isinstance(value, str)
    return wanted not in NAMES or type(value) is wanted


def describe(wanted: Any) -> str:
    """Return a type in words: ``a whole number or null``."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(one) for one in inner))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in _LISTS:
        return f"a list, each {describe(inner[0])}"
    if origin in _MAPPINGS:
        return f"a mapping, each value {describe(inner[-1])}"
    return NAMES.get(wanted, str(getattr(wanted, "__name__", wanted)))
