"""Numbers and tables on pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError

from sim.pages.render import commit_of, render, show, table


def cells(text: str) -> list[list[str]]:
    """Return the cells of the Markdown tables in a text, heading rows included."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if not all(cell.strip(":-") == "" and cell for cell in row)]


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [(0.1234, ".1%", "12.3 %"), (1234.5, ",.1f", "1,234.5"), (None, ".1f", "-"), (np.nan, "", "-"), ("5 %", "", "5 %")],
)
def test_a_missing_number_is_a_dash_and_a_share_has_a_space_before_its_percent_sign(
    value: object, spec: str, text: str
) -> None:
    assert show(value, spec) == text


def test_a_table_keeps_the_order_and_the_format_of_its_columns() -> None:
    text = table(
        [{"policy": "dense", "n": 1, "share": 0.5}, {"policy": "int4", "n": 22, "share": None}], {"share": ".0%"}
    )
    assert cells(text) == [["policy", "n", "share"], ["dense", "1", "50 %"], ["int4", "22", "-"]]
    assert text.splitlines()[1].startswith("|:-")
    assert text.splitlines()[1].endswith("-:|")


def test_a_template_that_asks_for_an_unknown_figure_fails(tmp_path: Path) -> None:
    template = tmp_path / "page.md.j2"
    template.write_text("# Title\n{% if true %}\n\n\n{{ x | show('.1f') }}\n{% endif %}\n", encoding="utf-8")
    assert render(template, x=1.0) == "# Title\n\n1.0\n"
    with pytest.raises(UndefinedError):
        render(template, y=1.0)


def test_a_page_names_a_dirty_commit() -> None:
    assert commit_of({"commit": "0123456789abcdef-dirty"}) == "0123456789ab-dirty"
    assert commit_of({"commit": "0123456789abcdef"}) == "0123456789ab"
