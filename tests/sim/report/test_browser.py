"""A report in a real browser: it is drawn, asks for nothing, zooms all time axes at once, and shows and hides runs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("plotly", reason="needs Plotly: pip install -e '.[report]'")

from sim.report.page import page
from sim.report.run_data import RunData
from tests.sim.report.browser import NAMES, Page, find_browser, open_browser
from tests.sim.report.test_page import HOSTILE, MADE_BY

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason=f"no browser is installed; install one of {', '.join(NAMES)}: apt install chromium"
)
DRAWN = "document.body && document.body.dataset.drawn"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def url(compared: list[RunData], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(compared, MADE_BY), encoding="utf-8")
    return path.as_uri()


def ranges(browser: Page) -> list[list[float]]:
    """Return the time ranges that the two figures over time show."""
    found: list[list[float]] = browser.value(
        "['timeline', 'plans'].map((id) => document.getElementById(id)._fullLayout.xaxis.range)"
    )
    return found


def test_every_figure_is_drawn_and_nothing_is_asked_for(browser: Page, url: str) -> None:
    browser.open(url, DRAWN)
    assert browser.value("document.body.dataset.drawn") == "4"
    traces = browser.value(
        "Object.fromEntries(Object.keys(figures).map((id) => [id, "
        "[figures[id].data.length, document.querySelectorAll(`#${id} .scatterlayer .trace, #${id} .hm`).length]]))"
    )
    assert {drawn == wanted > 0 for wanted, drawn in traces.values()} == {True}, traces
    assert browser.requests() == [url]
    assert browser.problems() == []
    with Image.open(io.BytesIO(browser.screenshot())) as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
    assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2), (0x73, 0x73, 0x73)} <= colors


def test_a_drag_in_one_figure_zooms_all_time_axes_and_a_link_keeps_it(browser: Page, url: str) -> None:
    browser.open(url, DRAWN)
    full = ranges(browser)
    assert full[0] == full[1]
    browser.value("document.querySelector('#timeline').scrollIntoView()")
    box = browser.value(
        "(({left, top, width, height}) => [left, top, width, height])"
        "(document.querySelector('#timeline .nsewdrag').getBoundingClientRect())"
    )
    left, top, width, height = box
    y = top + height / 2
    browser.drag((left + 0.25 * width, y), (left + 0.75 * width, y + 5))
    browser.wait("location.hash.startsWith('#t=')")
    browser.wait(
        "document.getElementById('plans')._fullLayout.xaxis.range[0] === "
        "document.getElementById('timeline')._fullLayout.xaxis.range[0]"
    )
    zoomed = ranges(browser)
    assert zoomed[0] == zoomed[1]
    end_s = full[0][1]
    assert zoomed[0] == pytest.approx([0.25 * end_s, 0.75 * end_s], abs=0.02 * end_s)
    link = url + browser.value("location.hash")
    browser.open(link, DRAWN)
    assert ranges(browser) == [pytest.approx(zoomed[0], rel=1e-6)] * 2
    browser.value("void Plotly.relayout('plans', {'xaxis.autorange': true})")
    browser.wait(f"document.getElementById('timeline')._fullLayout.xaxis.range[1] === {end_s}")
    assert ranges(browser) == full
    assert browser.problems() == []


def test_a_run_that_is_not_checked_is_hidden_in_every_figure(browser: Page, url: str) -> None:
    browser.open(url, DRAWN)
    seen = (
        "Object.keys(figures).map((id) => document.getElementById(id)._fullData"
        ".filter(({meta, visible}) => visible && meta.run === RUN).length)"
    )
    before = browser.value(seen.replace("RUN", "1"))
    assert min(before) > 0
    browser.value("document.querySelector('input[data-run=\"1\"]').click()")
    browser.wait(f"Math.max(...{seen.replace('RUN', '1')}) === 0")
    assert min(browser.value(seen.replace("RUN", "0"))) > 0
    browser.value("document.querySelector('input[data-run=\"1\"]').click()")
    browser.wait(f"Math.max(...{seen.replace('RUN', '1')}) > 0")
    assert browser.value(seen.replace("RUN", "1")) == before
    assert browser.problems() == []


def test_a_hostile_label_is_shown_as_text_and_runs_nothing(
    browser: Page, run: RunData, compared: list[RunData], tmp_path: Path
) -> None:
    path = tmp_path / "hostile.html"
    path.write_text(page([replace(run, label=HOSTILE), compared[0]], MADE_BY), encoding="utf-8")
    browser.open(path.as_uri(), DRAWN)
    assert browser.value("document.querySelectorAll('img, a[href*=evil], svg a').length") == 0
    assert HOSTILE in browser.value("document.querySelector('.runs label').textContent")
    shown = browser.value("document.querySelector('#plans .infolayer').textContent")
    assert HOSTILE[:30] in shown
    points = browser.value("[...document.querySelectorAll('#pareto .textpoint')].map((one) => one.textContent)")
    assert any(text.startswith(HOSTILE[:20]) for text in points)
    assert browser.requests() == [path.as_uri()]
    assert browser.problems() == []
