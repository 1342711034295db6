"""Render a page of results: prose comes from a Jinja2 template, numbers and tables come from Python."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

Rows = pd.DataFrame | Sequence[Mapping[str, Any]]


def show(value: Any, spec: str = "") -> str:
    """Return a value as text.

    Args:
        value: a number or text; None and NaN become ``-``.
        spec: a format specification of Python; ``.1%`` gives ``12.3 %``.
    """
    if value is None or value != value:
        return "-"
    text = format(value, spec)
    return text.replace("%", " %") if spec.endswith("%") else text


def table(rows: Rows, formats: Mapping[str, str] | None = None, left: int = 1) -> str:
    """Return a Markdown table.

    Args:
        rows: a frame, or one mapping per row; the keys are the headings.
        formats: heading -> format specification, as for ``show``.
        left: how many columns, from the first, are aligned to the left; numbers follow them, aligned to the right.
    """
    frame = pd.DataFrame(rows).astype(object)
    for heading in frame.columns:
        spec = (formats or {}).get(heading, "")
        frame[heading] = [show(value, spec) for value in frame[heading]]
    align = ["left" if at < left else "right" for at in range(frame.shape[1])]
    return frame.to_markdown(index=False, disable_numparse=True, colalign=align)


def render(template: Path, **context: Any) -> str:
    """Return the page that a template makes of a context; a name that the context lacks is an error.

    Templates may call ``show`` and ``table``, and use ``show`` as a filter. Blank lines are collapsed, so that
    conditions and loops need no whitespace control.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["show"] = show
    text = environment.get_template(template.name).render(context, show=show, table=table)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def commit_of(made: Mapping[str, Any]) -> str:
    """Return the first 12 digits of the commit in a provenance, with ``-dirty`` where the work tree differed."""
    commit = str(made["commit"])
    return commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")
