"""Makes hostile inputs: JSON values of the wrong kind, damaged text and damaged bytes."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

DEEP = "@@DEEP@@"
DOUBLE = "@@DOUBLE@@"
DEPTHS = (50, 500, 990, 3000, 100_000)
LONE_SURROGATE = "\ud83d"

EDGE_NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 15, 16, 255, 256, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63)),
    *(10**30, -(10**30), 10**400),
    *(0.0, -0.0, 0.5, 1.5, 2.0, 3.0, -0.5, 1e-3, 5e-324, 1e15, 1e18, 1e19, 1e20, 1e308, -1e308),
    *(math.nan, math.inf, -math.inf),
)
EDGE_TEXTS = (
    *("", " ", "0", "1", "-1", "1.5", "true", "null", "NaN", "inf", "1e308", "a", "é", "\x00", "\n", "\u2028"),
    *(
        LONE_SURROGATE,
        "\ud83d\ude00",
        "../../etc/passwd",
        "%s%n{}",
        "<|endoftext|>",
        "{{ 7*7 }}",
        "\uff11\uff12",
        "1_000",
    ),
)
EDGE_VALUES: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], [True], {"a": None}, {"": ""}, DEEP)
CELLS = (
    *("", " ", "NaN", "nan", "inf", "-inf", "Infinity", "1e308", "1e309", "-0", "-1", "0.5", "2.0", "1e3", "1e-400"),
    *(
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551616",
        "1" * 400,
        "0x10",
        "1_000",
        "\uff11\uff12",
        "+5",
    ),
    *(" 5", "5 ", '"5"', "'5'", "5;6", "5,6", "null", "None", "true", "\x00", "=1+1", "\ud83d", "\t", "-", ".", "e"),
)
DIGITS = re.compile(rb"\d+")


def edge_value(rng: random.Random) -> Any:
    """Return a value that code seldom expects."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(EDGE_NUMBERS)
    if kind < 0.65:
        return rng.choice(EDGE_TEXTS)
    if kind < 0.66:
        return rng.choice(("x", "é", "0", LONE_SURROGATE, "\x00")) * rng.choice((1000, 70_000))
    if kind < 0.7:
        return [rng.choice(EDGE_NUMBERS) for _ in range(rng.randrange(1, 6))]
    if kind < 0.71:
        return [rng.choice((0, None, "", [], 1.5))] * rng.choice((100, 5000))
    return copy.deepcopy(rng.choice(EDGE_VALUES))  # a later change must not change this table


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(EDGE_TEXTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
"""Any JSON value, for hypothesis."""


def to_json(value: Any, rng: random.Random) -> bytes:
    """Return JSON; a DEEP becomes deep nesting, and DOUBLE vanishes from keys, which then stand there twice."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    if DOUBLE in text:
        text = text.replace(DOUBLE, "")
    if DEEP in text:
        depth = rng.choice(DEPTHS)
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
        closing = closing * depth if rng.random() < 0.8 else ""
        text = text.replace(f'"{DEEP}"', opening * depth + ("1" if opening != "[" else "") + closing)
    return text.encode("utf-8", "surrogatepass")


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Return the value with one to three changes; it is changed in place where it is a container."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _changed(value, rng)
    return value


def _changed(value: Any, rng: random.Random) -> Any:
    """Change one node, found by a random descent that stops anywhere."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.02:
        return edge_value(rng) if rng.random() < 0.8 else _near(value, rng)
    keys: Sequence[Any] = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(keys)
    if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.75:
        value[key] = _changed(value[key], rng)
        return value
    if rng.random() < 0.6:
        value[key] = edge_value(rng) if rng.random() < 0.7 else _near(value[key], rng)
        return value
    return _reshaped(value, key, keys, rng)


def _reshaped(value: Any, key: Any, keys: Sequence[Any], rng: random.Random) -> Any:
    """Change which entries a container has."""
    how = rng.randrange(7)
    if how == 0:
        del value[key]
    elif how == 1:
        other = rng.choice(keys)
        value[key], value[other] = value[other], value[key]
    elif how == 2:
        value[key] = rng.choice(([value[key]], {"a": value[key]}, str(value[key])[:2000]))
    elif isinstance(value, dict):
        if how == 3:
            value[f"{key}{DOUBLE}"] = edge_value(rng)
        elif how == 4:
            value[rng.choice((str(key).upper(), f"{key} ", f"{key}s", "", "__class__", LONE_SURROGATE))] = value.pop(
                key
            )
        else:
            value[rng.choice(("a", "id", "_target_", "self", "model", "\x00", "x" * 5000))] = edge_value(rng)
    elif how == 3:
        value *= rng.choice((2, 3, 50))
    elif how == 4:
        del value[rng.randrange(len(value)) :]
    elif how == 5:
        rng.shuffle(value)
    else:
        value.insert(rng.randrange(len(value) + 1), edge_value(rng))
    return value


def _near(value: Any, rng: random.Random) -> Any:
    """Return a value close to this one: a number a little off, another type that reads alike."""
    if isinstance(value, bool) or value is None:
        return rng.choice((0, 1, "true", "false", not value))
    if isinstance(value, int):
        half = value + 0.5 if abs(value) < 2**60 else value
        return rng.choice((value + 1, value - 1, -value, value * 1000, half // 1, str(value)[:500], half, [value]))
    if isinstance(value, float):
        return rng.choice((-value, value * 1e6, value * 1e-6, value + 1, str(value), math.nan, math.inf))
    if isinstance(value, str):
        return rng.choice((value.upper(), value[:-1], value + " ", value + "\x00", value * 3, [value], 0))
    return edge_value(rng)


def mutate_bytes(content: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """Return the bytes with one to four changes: flips, cuts, insertions, repetitions, and pieces of ``other``."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(found) + 1)
        end = min(len(found), at + rng.choice((1, 2, 8, 64)))
        how = rng.randrange(7)
        if how == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del found[at:]
        elif how == 2:
            del found[at:end]
        elif how == 3:
            found[at:at] = rng.choice(
                (b"\x00", b"\xff", b"\n", b"\r", b'"', b",", b"{", b"\xed\xa0\x80", b"\xef\xbb\xbf")
            )
        elif how == 4:
            found[at:at] = found[at:end] * rng.choice((1, 3, 40))
        elif how == 5 and other:
            start = rng.randrange(len(other))
            found[at:end] = other[start : start + rng.randrange(1, 200)]
        elif at < len(found):
            found[at] = rng.randrange(256)
    return bytes(found)


def mutate_text(content: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """Return a text with one to three changes: a number replaced, a line changed, or bytes as ``mutate_bytes``."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        how = rng.random()
        if how < 0.5:
            found = [match.span() for match in DIGITS.finditer(content)]
            if found:
                start, end = rng.choice(found)
                content = content[:start] + rng.choice(CELLS).encode("utf-8", "surrogatepass") + content[end:]
        elif how < 0.8:
            content = _change_line(content, rng)
        else:
            content = mutate_bytes(content, rng, other)
    return content


def _change_line(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    how = rng.randrange(8)
    if how == 0:
        lines[at:at] = [lines[at]] * rng.choice((1, 2, 300))
    elif how == 1:
        del lines[at]
    elif how == 2:
        rng.shuffle(lines)
    elif how == 3:
        lines[at] = lines[at].replace(b",", rng.choice((b";", b"\t", b",,", b"")))
    elif how == 4:
        lines[at] = b'"' + lines[at]
    elif how == 5:
        lines[at] = rng.choice((b"", b" ", b"#", b"null", b"{}", b"[]", b"x" * 100_000))
    elif how == 6:
        return rng.choice((b"\r", b"\r\n", b"\n\n", b"\x0b", b"\x85")).join(lines)
    else:
        cells = lines[at].split(b",")
        rng.shuffle(cells)
        lines[at] = b",".join(cells)
    return b"\n".join(lines)
