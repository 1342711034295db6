"""What commands print: on a terminal of any encoding, into a pipe that may close, onto a disk that may be full."""

from __future__ import annotations

import codecs
import io
import os
import sys
import unicodedata

SIGNS = {
    "±": "+-",
    "\N{MULTIPLICATION SIGN}": "x",
    "→": "->",
    "≤": "<=",
    "≥": ">=",
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
}
"""What stands for a character that an encoding lacks; others lose their accents, or become a question mark."""


def _nearest_signs(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = []
    for sign in error.object[error.start : error.end]:
        plain = unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()
        found.append(SIGNS.get(sign) or plain or "?")
    return "".join(found), error.end


codecs.register_error("nearest-signs", _nearest_signs)


def print_any_text() -> None:
    """Let stdout and stderr print any text, whatever their encoding: what it lacks becomes the nearest signs."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="nearest-signs")


def forget_stdout() -> None:
    """Send the rest of stdout nowhere, after its reader has gone: Python would complain when it flushes at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
