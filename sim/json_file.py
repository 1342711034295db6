"""Reads a JSON file that a user can name: any fault of the file is one short reason, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sim.errors import RapLabError

MOST_BYTES = 256 * 1024 * 1024
"""No file of this project comes near; the limit keeps a wrong file from filling the memory."""


def read_json(path: Path, error: Callable[[str], RapLabError], advice: str, *, most_bytes: int = MOST_BYTES) -> Any:
    """Return the content of a JSON file.

    Args:
        path: the file.
        error: what to raise, such as ``ModelError``.
        advice: what to do next, the end of the message.
        most_bytes: a larger file is refused.
    Raises:
        RapLabError: of the type ``error``, if the file cannot be read, is too large, or is no JSON.
    """
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise error(f"{path} has {size:,} bytes; {most_bytes:,} are allowed. {advice}")
        return json.loads(path.read_text(encoding="utf-8"))
    except RapLabError:
        raise
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror or fault}; {advice}") from fault
    except RecursionError as fault:
        raise error(f"{path} is not valid JSON: it nests too deep; {advice}") from fault
    except (ValueError, MemoryError) as fault:  # JSONDecodeError, UnicodeDecodeError, an integer of 5,000 digits
        raise error(f"{path} is not valid JSON: {' '.join(str(fault).split())}; {advice}") from fault


def read_json_object(
    path: Path, error: Callable[[str], RapLabError], advice: str, *, most_bytes: int = MOST_BYTES
) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object; as ``read_json``."""
    content = read_json(path, error, advice, most_bytes=most_bytes)
    if not isinstance(content, dict):
        raise error(f"{path} holds a {type(content).__name__}, not a JSON object; {advice}")
    return content
