"""The page of a report: what its figures and tables hold, that it asks for nothing, and that text stays text."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

pytest.importorskip("plotly", reason="needs Plotly: pip install -e '.[report]'")

import plotly.graph_objects as go

from sim.report import figures, series
from sim.report.page import (
    count_rows,
    differences,
    figure_rows,
    latency_rows,
    page,
    provenance_rows,
    script_code,
    script_data,
)
from sim.report.run_data import RunData

MADE_BY = {"command": "python -m sim.report <run>", "commit": "0" * 40, "written_at": "2026-01-01"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&%{x}<a href='http://evil.test'>b</a>"


class Elements(HTMLParser):
    """Collects the elements of a page, and the text of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data


def elements(text: str) -> Elements:
    parser = Elements()
    parser.feed(text)
    return parser


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for one in value.values() for text in strings(one)]
    if isinstance(value, list):
        return [text for one in value for text in strings(one)]
    return [value] if isinstance(value, str) else []


@pytest.fixture(scope="module")
def text(run: RunData) -> str:
    return page([run], MADE_BY)


def test_nothing_in_the_page_is_loaded_from_anywhere(text: str) -> None:
    found = elements(text)
    assert {tag for tag, _ in found.found}.isdisjoint({"link", "img", "iframe", "object", "embed", "base", "form"})
    names = {name for _, attributes in found.found for name in attributes}
    assert names.isdisjoint({"src", "href", "srcset", "action", "data", "poster", "background"})
    boot, library = found.scripts[2], found.scripts[1]
    without = text.replace(library, "")
    assert re.findall(r"https?:|@import|url\(|//cdn|fetch\(|XMLHttp|WebSocket|import\(", without) == []
    assert "Plotly.newPlot" in boot


def test_a_browser_may_run_the_two_scripts_of_the_page_alone(text: str) -> None:
    found = elements(text)
    policy = next(a["content"] for tag, a in found.found if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    hashes = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in found.scripts[1:]]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert "connect-src" not in policy  # default-src forbids connections
    assert not re.search(r"script-src[^;]*unsafe-inline", policy)


def test_text_of_a_run_stays_text(run: RunData, compared: list[RunData]) -> None:
    config = {**run.config, "tags": [HOSTILE], "label": HOSTILE}
    more = {
        "config": config,
        "config_text": HOSTILE,
        "provenance": {"command": HOSTILE, "versions": {HOSTILE: HOSTILE}},
        "hardware": {"device": HOSTILE},
        "summary": {**run.summary, "quality_note": HOSTILE},
    }
    plain = page([run, compared[0]], MADE_BY)
    hostile = page([replace(run, label=HOSTILE, **more), compared[0]], MADE_BY | {"command": HOSTILE})
    before, after = elements(plain), elements(hostile)
    added = {tag for tag, _ in after.found} - {tag for tag, _ in before.found}
    assert added == set()
    assert len(after.scripts) == 3
    assert not any(name.startswith("on") for _, attributes in after.found for name in attributes)
    assert html.escape(HOSTILE) in hostile.replace("&#34;", "&quot;").replace("&#39;", "&#x27;")
    drawn = json.loads(after.scripts[0])
    for shown in strings(drawn):
        # Plotly reads <b>, <a> and the like, and replaces %{x}; only tags that the figures write may be there.
        assert set(re.findall(r"<[^>]*>", shown)) <= {"<br>", "<extra>", "</extra>"}
        assert "%{x}<" not in shown
        assert shown.count("%{x}") == 0


def test_data_cannot_end_the_script_that_holds_them() -> None:
    value = {"text": HOSTILE + "<!--\u2028\u2029&amp;", "numbers": [1, None, 0.5]}
    text = script_data(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value
    with pytest.raises(ValueError, match="ends it in HTML"):
        script_code("a = '</SCRIPT >'")


def test_every_figure_is_one_that_plotly_knows(compared: list[RunData]) -> None:
    found = figures.pareto(compared)
    assert found is not None
    for figure in (figures.timeline(compared), figures.latencies(compared), figures.plan_maps(compared), found[0]):
        go.Figure(figure)  # raises ValueError for an unknown property or value


def lines(figure: Any, axis_title: str) -> list[Any]:
    """Return the lines of the panel with a title."""
    layout = figure["layout"]
    titles = {one["text"]: one["y"] for one in layout["annotations"]}
    middle = titles[axis_title]
    name = next(k for k, v in layout.items() if k.startswith("yaxis") and v["domain"][0] <= middle <= v["domain"][1])
    return [line for line in figure["data"] if line["yaxis"] == name.replace("axis", "")]


def test_the_timeline_draws_what_the_run_recorded(run: RunData) -> None:
    figure = figures.timeline([run])
    assert {line["xaxis"] for line in figure["data"]} == {"x"}
    assert run.iterations is not None
    (waiting,) = lines(figure, "waiting<br>requests")
    assert figures.unpacked(waiting["y"]).max() == run.iterations["waiting"].max()
    (kv,) = lines(figure, "KV blocks<br>in use [%]")
    assert np.nanmax(figures.unpacked(kv["y"])) == pytest.approx(100 * run.summary["kv_peak_share"])
    (budget,) = lines(figure, "memory<br>budget [GB]")
    assert run.server is not None
    drawn = np.unique(figures.unpacked(budget["y"]) * 1e9)
    assert drawn == pytest.approx(np.unique([size for time_s, size in run.server.budget if time_s < run.end_s]))
    assert len(drawn) > 1
    (weights,) = lines(figure, "weights in<br>memory [GB]")
    assert run.kept_share is not None
    lowest = run.kept_share["kept_share"].min() * run.server.dense_weight_bytes
    assert figures.unpacked(weights["y"]).min() * 1e9 == pytest.approx(lowest)
    bars, marks = lines(figure, "plan<br>changes")
    assert len(figures.unpacked(marks["x"])) == run.summary["transitions"]
    assert len(bars["x"]) % 3 == 0


def test_a_map_of_plans_has_a_row_per_block_and_one_between_mha_and_ffn(run: RunData) -> None:
    figure = figures.plan_maps([run])
    assert figure is not None
    (heat,) = figure["data"]
    states, found = figures.unpacked(heat["z"]), series.plan_map(run, run.end_s)
    assert found is not None
    np.testing.assert_array_equal(np.delete(states, 32, axis=0), found.state)
    assert (states[32] == -1).all()
    assert len(figures.unpacked(heat["y"])) == len(states) + 1
    assert heat["text"][33][0].startswith("FFN 0: ")
    colors = ["#ffffff", *(color for _, color in figures.STATES.values())]
    for state, color in zip([-1, *figures.STATES], colors, strict=True):
        share = (state - heat["zmin"]) / (heat["zmax"] - heat["zmin"])  # in the middle of a step of one color
        below = [shown for edge, shown in heat["colorscale"] if edge < share][-1]
        above = next(shown for edge, shown in heat["colorscale"] if edge > share)
        assert below == above == color


def test_each_run_of_many_has_its_own_line_style_and_the_first_is_gray() -> None:
    styles = [tuple(figures.style_of(rank, 24).values()) for rank in range(24)]
    assert len(set(styles)) == 24
    assert styles[0] == (figures.GRAY, "solid")
    assert figures.style_of(0, 1)["color"] == "#0072B2"


def test_runs_are_compared_by_quality_slo_and_bytes(compared: list[RunData]) -> None:
    assert [run.label for run in compared] == ["dense", "random", "morphserve"]  # as sim.compare has them
    found = figures.pareto(compared)
    assert found is not None
    figure, front, excels_in = found
    assert excels_in == ["SLO attainment", "perplexity", "weights in memory"]
    quality = [mark for mark in figure["data"] if mark["xaxis"] == "x"]
    assert [mark["y"][0] for mark in quality] == [100 * run.summary["slo_attainment"] for run in compared]
    assert [mark["x"][0] for mark in quality] == pytest.approx([run.summary["perplexity_ratio"] for run in compared])
    memory = [mark["x"][0] for mark in figure["data"] if mark["xaxis"] == "x2"]
    assert memory[0] == pytest.approx(compared[0].server.dense_weight_bytes / 1e9)  # type: ignore[union-attr]
    assert 0 < min(memory[1:]) <= max(memory[1:]) < memory[0]
    filled = [rank for rank, mark in enumerate(quality) if not mark["marker"]["symbol"].endswith("-open")]
    assert filled == front
    assert 0 in front  # nothing has less perplexity than dense
    assert figures.pareto(compared[:1]) is None
    unknown = figures.pareto([replace(compared[0], server=None, kept_share=None), *compared[1:]])
    assert unknown is not None
    assert unknown[2] == ["SLO attainment", "perplexity"]
    assert [mark["meta"]["run"] for mark in unknown[0]["data"] if mark["xaxis"] == "x2"] == [1, 2]


def test_labels_that_would_cover_each_other_are_moved() -> None:
    x, y = np.array([1.0, 1.0, 1.01, 2.0, np.nan]), np.array([0.5, 0.5, 0.505, 1.0, 1.0])
    places = figures.label_places(x, y, [10] * 5)
    assert len(set(places[:3])) == 3
    assert all(place in figures.PLACES for place in places)


def test_a_replay_states_the_perplexity_that_a_comparison_states(run: RunData, compared: list[RunData]) -> None:
    for one in compared:
        bare = replace(one, summary={k: v for k, v in one.summary.items() if k != "perplexity_ratio"})
        assert bare.perplexity_ratio == pytest.approx(one.summary["perplexity_ratio"])
    assert run.perplexity_ratio is not None
    assert run.perplexity_ratio > 1.0
    assert replace(run, server=None).perplexity_ratio is None


def test_tables_hold_the_figures_of_the_summary_and_what_differs(compared: list[RunData]) -> None:
    heading, *rows = figure_rows(compared)
    assert [row[0] for row in rows] == ["dense", "random", "morphserve"]
    at = heading.index("SLO attainment")
    assert [row[at] for row in rows] == [f"{100 * run.summary['slo_attainment']:.1f} %" for run in compared]
    assert len(latency_rows(compared)) == 1 + 3 * 4  # without the client's, which are equal
    assert count_rows(compared)[1][1] == f"{compared[0].summary['requests']:,}"
    changed = {row[0]: row[1:] for row in differences(compared)}
    assert changed["policy._target_"][0] != changed["policy._target_"][1]
    assert "trace.duration_s" not in changed
    assert differences(compared[:1]) == []
    stated = {row[0]: row[1] for row in provenance_rows(compared)}
    assert stated["command"] == compared[0].provenance["command"]


def test_the_page_says_what_is_missing_and_how_to_get_it(run: RunData, text: str) -> None:
    assert "lacks parts" not in text
    bare = replace(run, iterations=None, transitions=None, kept_share=None, server=None, provenance={})
    shown = page([bare], MADE_BY)
    for name in ("iterations.parquet", "transitions.parquet", "kept_share.parquet", "server.json", "provenance.json"):
        assert name in shown
    assert "iterations=true" in shown
    assert "plans" not in json.loads(elements(shown).scripts[0])
    panels = {one["text"] for one in json.loads(elements(shown).scripts[0])["timeline"]["layout"]["annotations"]}
    assert panels == {"arrivals<br>per second", "waiting<br>requests", "running<br>requests"} | {
        "SLO attainment<br>by arrival [%]"
    }


def test_what_several_runs_lack_is_said_once(run: RunData) -> None:
    bare = [replace(run, label=label, iterations=None) for label in ("a", "b")]
    shown = page([bare[0], run, bare[1]], MADE_BY)
    assert shown.count("iterations.parquet: ") == 1
    assert "<b>a, b</b> lack parts of this report" in shown


def test_a_run_of_several_engines_is_not_asked_for_files_that_its_command_never_writes(run: RunData) -> None:
    cluster = replace(run, iterations=None, server=None, records=run.records.assign(replica=0))
    assert [text.partition(" none, ")[0] for text in cluster.missing] == [
        "iterations.parquet: this command writes",
        "server.json: this command writes",
    ]


def test_the_page_says_when_runs_did_not_get_the_same_requests(run: RunData, compared: list[RunData]) -> None:
    note = "did not serve the same requests"
    assert note not in page(compared, MADE_BY)
    sooner = compared[1].records.assign(arrival_s=compared[1].records["arrival_s"] / 2)
    longer = compared[1].records.assign(output_tokens=compared[1].records["output_tokens"] + 1)
    for records in (sooner, longer, compared[1].records.iloc[1:]):
        assert note in page([compared[0], replace(compared[1], records=records)], MADE_BY)


def test_the_page_says_when_runs_are_judged_by_different_slos(run: RunData) -> None:
    assert "different SLOs" not in page([run, replace(run, label="b")], MADE_BY)
    strict = replace(run, label="b", config={**run.config, "slo": {"ttft_s": 2.0, "tpot_s": 0.1}})
    free = replace(run, label="c", config={**run.config, "slo": {}})
    shown = page([run, strict, replace(run, label="d"), free], MADE_BY)
    stated = f"TTFT 2 s ({run.label}, d); TTFT 2 s, TPOT 0.1 s (b); no target (c)."
    assert f"cannot be compared: {stated}" in shown


def test_targets_of_the_slo_are_drawn_where_they_are_and_named_once(run: RunData) -> None:
    strict = replace(run, label="b", config={**run.config, "slo": {"ttft_s": 1.0, "tpot_s": 0.1}})
    layout = figures.latencies([run, strict])["layout"]
    assert [(line["xref"], line["x0"]) for line in layout["shapes"]] == [("x", 1.0), ("x", 2.0), ("x2", 0.1)]
    assert [one["text"] for one in layout["annotations"]] == ["SLO 1, 2 s", "SLO 0.1 s"]


def test_latencies_that_no_request_has_leave_an_axis_that_shows_the_target(run: RunData) -> None:
    refused = run.records.assign(ttft_s=np.nan, tpot_s=np.nan, e2e_s=np.nan)
    axis = figures.latencies([replace(run, records=refused)])["layout"]["xaxis"]
    assert axis["range"][0] < np.log10(run.targets_s["ttft_s"]) < axis["range"][1]


def test_rounding_errors_of_perplexity_do_not_rank_runs(compared: list[RunData]) -> None:
    dense = compared[0]
    nearly = replace(dense, label="b", summary={**dense.summary, "perplexity_ratio": 1.0 - 4e-16})
    found = figures.pareto([dense, nearly])
    assert found is not None
    assert found[1] == [0, 1]
    assert [mark["x"] for mark in found[0]["data"] if mark["xaxis"] == "x"] == [[1.0], [1.0]]


def test_a_run_of_nothing_has_a_page(run: RunData) -> None:
    none = {name: dict.fromkeys(("mean", "p50", "p90", "p95", "p99", "max")) for name in ("ttft_s", "tpot_s", "itl_s")}
    none["e2e_s"] = none["ttft_s"]
    summary = {**run.summary, **none, "slo_attainment": None}
    frames = {name: getattr(run, name).iloc[:0] for name in ("records", "iterations", "transitions")}
    shown = page([replace(run, summary=summary, **frames)], MADE_BY)
    for figure in json.loads(elements(shown).scripts[0]).values():
        go.Figure(figure)


def test_the_page_grows_little_with_the_length_of_a_run(run: RunData, text: str) -> None:
    """Twenty times the iterations and requests: lines are thinned, so the page is not even one megabyte larger."""
    import pandas as pd

    assert run.iterations is not None

    def repeated(frame: pd.DataFrame, columns: tuple[str, ...]) -> pd.DataFrame:
        parts = [frame.copy() for _ in range(20)]
        for number, part in enumerate(parts):
            for name in columns:
                part[name] += number * run.end_s
        return pd.concat(parts, ignore_index=True)

    long = replace(
        run,
        records=repeated(run.records, ("arrival_s", "admitted_s", "first_token_s", "finish_s")),
        iterations=repeated(run.iterations, ("start_s", "end_s")),
    )
    assert len(page([long], MADE_BY)) < len(text) + 1e6
