"""``python -m hw.client``: its run folder, its exit status, and what it prints."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

pytest.importorskip("httpx", reason="hw.client needs httpx: pip install -e '.[hw]'")

from hw.client.run import main
from tests.commands import exit_status
from tests.hw.client.mock_server import MockServer, Step, event, head, plain, serving, text


@pytest.fixture(autouse=True)
def no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAP_LAB_PROGRESS", "0")  # on a busy machine there would be lines of it


def arguments(folder: Path, mock: MockServer | None, *more: str, rows: str = "0,5,3\n0.01,6,2\n") -> list[str]:
    trace = folder / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    url = [f"client.url={mock.url}"] if mock is not None else []
    return [*url, "trace=file", f"trace.path={trace}", f"hydra.run.dir={folder / 'run'}", *more]


def test_a_run_has_the_files_of_a_replay_and_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("THE_KEY", "sk-secret")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with serving(plain) as mock:
        assert exit_status(main, *arguments(tmp_path, mock, "client.api_key=THE_KEY")) == 0
    assert "authorization: bearer sk-secret" in mock.heads[0].lower()
    records = pd.read_parquet(tmp_path / "run" / "records.parquet")
    assert records.status.tolist() == ["finished"] * 2
    assert records.prompt_tokens.tolist() == [5, 6]
    assert records.produced_tokens.tolist() == [3, 2]
    figures = json.loads((tmp_path / "run" / "client.json").read_text())
    assert (figures["failed"], figures["errors"], figures["itl"]) == (0, [], "per token")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"summary.json", "transitions.parquet", "provenance.json", "config.yaml"} <= names
    for path in (tmp_path / "run").iterdir():
        assert b"sk-secret" not in path.read_bytes()
    assert capsys.readouterr().err == ""


def test_a_typed_key_is_refused_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(main, *arguments(tmp_path, None, "client.api_key=sk-secret")) == 2
    assert "secret" not in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.yaml"))


def test_a_run_in_which_nothing_finished_fails_and_says_each_reason_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_body: dict[str, Any]) -> list[Step]:
        return [head("503 Busy", "application/json"), b'{"error": {"message": "no \\ud83d room"}}']

    with serving(refuse) as mock:
        assert exit_status(main, *arguments(tmp_path, mock, rows="0,5,3\n" * 5)) == 1
    error = capsys.readouterr().err
    assert error.splitlines() == ["failed: 5 of 5 requests: HTTP 503: no ? room", "error: none of 5 requests finished"]
    figures = json.loads((tmp_path / "run" / "client.json").read_text())
    assert figures["errors"] == [{"reason": "HTTP 503: no ? room", "requests": 5}]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rejected"] == 5


def test_a_server_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(plain) as mock:
        pass  # its port is free again
    assert exit_status(main, *arguments(tmp_path, mock)) == 1
    assert f"failed: 2 of 2 requests: no connection to {mock.url}: " in capsys.readouterr().err


def test_some_failures_are_named_but_do_not_fail_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sometimes(body: dict[str, Any]) -> Any:
        return plain(body) if len(body["prompt"]) == 5 else [head(), event(text("a"))]

    with serving(sometimes) as mock:
        assert exit_status(main, *arguments(tmp_path, mock)) == 0
    assert "failed: 1 of 2 requests: the connection was cut" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("client.url=http://h:99999", "no address"),
        ("client.loop=opne", "did you mean 'open'"),
        ("client.users=0", "client.users is 0; it must be at least 1"),
        ("client.max_connections=0", "at least 1"),
        ("client.retries=-1", "at least 0"),
        ("client.timeout_s=0", "must be above 0 seconds"),
        ("client.timeout_s=nan", "must be above 0 seconds"),
        ("client.characters_per_token=0", "must be above 0"),
        ("client.characters_per_token=nan", "must be above 0"),
        ("client.chat=true", "client.text is null"),
        ("client.text=/no/such", "no text at /no/such"),
        ("client.text={empty}", "is empty"),
        ("client.text={folder}", "no text at"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    override = override.format(empty=empty, folder=tmp_path)
    assert exit_status(main, *arguments(tmp_path, None, override)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_full_disk_loses_the_files_and_not_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(plain) as mock:
        given = arguments(tmp_path, mock)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            assert exit_status(main, *given) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    output, error = capsys.readouterr()
    assert "finished 2" in output
    assert error.startswith("error: ")
    assert not (tmp_path / "run" / "summary.json").exists()


def test_ctrl_c_keeps_the_records_so_far(tmp_path: Path) -> None:
    def some(body: dict[str, Any]) -> Any:
        return plain(body) if len(body["prompt"]) == 5 else [head(), event(text("a")), 600.0]

    rows = "0,5,3\n0.01,6,2\n600,5,3\n"
    with serving(some) as mock:
        command = [sys.executable, "-m", "hw.client", *arguments(tmp_path, mock, rows=rows)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=dict(os.environ))
        for _ in range(1200):
            if len(mock.bodies) == 2:
                break
            time.sleep(0.05)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.decode().splitlines()[-1] == "interrupted: kept the records of 2 of 3 requests"
    records = pd.read_parquet(tmp_path / "run" / "records.parquet")
    assert records.status.tolist() == ["finished", "running"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["interrupted"], summary["unfinished"], summary["not_arrived"]) == (True, 1, 1)
