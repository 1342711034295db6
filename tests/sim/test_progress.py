"""Progress lines and bars: what they say, and where."""

from __future__ import annotations

import io
import itertools
import os
import re
import sys
import time
from pathlib import Path

import pytest

import sim.replay.__main__
from sim import progress
from sim.progress import counted, duration, line
from tests.commands import exit_status


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_a_duration_reads_like_one(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_extrapolates_the_time_left_and_says_none_before_anything_is_done() -> None:
    assert line("replaying", 400, "requests", 100, "", 5.0) == "replaying: 100 of 400 requests, 5 s, about 15 s left"
    assert line("replaying", 400, "requests", 0, "at 3 s", 5.0) == "replaying: 0 of 400 requests at 3 s, 5 s"
    assert line("training", 100, "%", 60, "", 5.0, begun=50) == "training: 60 of 100 %, 5 s, about 20 s left"
    assert line("replaying", 0, "requests", 0, "", 5.0) == "replaying: 0 of 0 requests, 5 s"


def wait_for(stream: io.StringIO, text: str) -> None:
    for _ in range(1000):
        if text in stream.getvalue():
            return
        time.sleep(0.01)
    raise AssertionError(f"{text!r} did not come: {stream.getvalue()!r}")


def test_a_long_task_without_a_terminal_prints_lines_also_while_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.01)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.01)
    stream = io.StringIO()
    with progress.progress("scoring", 4, "plans", stream) as report:
        wait_for(stream, "scoring: 0 of 4 plans, 0 s\n")
        report(1, "of layer 2")
        wait_for(stream, "scoring: 1 of 4 plans of layer 2, ")
    printed = stream.getvalue()
    time.sleep(0.05)
    assert stream.getvalue() == printed  # nothing comes after the task


def test_a_task_inside_another_prints_nothing_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.01)
    stream = io.StringIO()
    outer = progress.progress("sweeping", 4, "runs", stream)
    with outer, progress.progress("replaying", 4, "requests", stream) as report:
        report(1)
        wait_for(stream, "sweeping: 0 of 4 runs")
    assert "replaying" not in stream.getvalue()


def test_a_short_task_prints_nothing() -> None:
    stream = io.StringIO()
    with progress.progress("scoring", 4, "plans", stream) as report:
        report(4)
    assert stream.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [40, 80])
def test_a_narrow_terminal_shows_one_line_with_both_times(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with progress.progress("replaying", 1_608_380, "requests", stream) as report:
        report(1_234_567, "at 25,373 s of the trace")
        time.sleep(0.3)  # the bar is drawn ten times a second
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()))
    drawn = [line for line in lines if line.strip()]
    assert drawn
    assert all(line.startswith("replaying ") and len(line) <= columns for line in drawn)
    assert re.search(r"…\s+0:00:0\d [-:\d]{7}$", drawn[-1].rstrip())


@pytest.mark.parametrize("same_terminal", [True, False])
def test_a_line_printed_during_a_bar_goes_above_it_or_to_its_own_file(
    same_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", output := stream if same_terminal else io.StringIO())
    with progress.progress("training", 4, "iterations", stream) as report:
        report(1)
        time.sleep(0.3)  # the bar is drawn ten times a second
        print("iteration 1 is done")
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue()))
    assert "iteration 1 is done" in [line.rstrip() for line in lines]
    assert same_terminal or "iteration 1" not in stream.getvalue()


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with progress.progress("scoring", 4, "plans", stream) as report:
        assert counted(itertools.repeat("plan", 4), report) == ["plan"] * 4
    assert "4 of 4 plans" in stream.getvalue()


def test_an_option_of_every_command_turns_progress_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.0)
    monkeypatch.delenv(progress.VARIABLE, raising=False)
    for options, shown in (((), True), (("--quiet",), False)):
        folder = f"hydra.run.dir={tmp_path / str(shown)}"
        assert exit_status(sim.replay.__main__.main, "trace=poisson", "trace.duration_s=20", folder, *options) == 0
        assert ("replaying" in capsys.readouterr().err) == shown
    assert progress.VARIABLE not in os.environ


def test_progress_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(os.environ, "RAP_LAB_PROGRESS", "0")
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.0)
    with progress.progress("scoring", 4, "plans") as report:
        report(4)
        progress.say("compiling")
        time.sleep(0.02)
    assert capfd.readouterr().err == ""
