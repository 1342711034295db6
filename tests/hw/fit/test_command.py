"""``python -m hw.fit`` as a user runs it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import hw.fit.run as command
import hw.fit.settings as settings
from hw.fit.fitting import Fitted
from hw.fit.measured import MeasuredRun
from hw.fit.parameters import Point
from hw.fit.run import main
from sim.cost.latency import load_calibration
from sim.cost.model_spec import load_model
from sim.cost.plan import dense_plan
from tests.commands import exit_status
from tests.hw.fit.truth import a_server, requests, served, write_vllm_bench

SERVER = ("model=llama3.1_8b", "gpu=h100_80gb", "engine.schedules_ahead=true")
TRUE = {"front_s": 0.009, "memory_bound": 1.1}


@pytest.fixture
def result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a result of vllm bench serve, in the current folder; calibrations go to a folder next to it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "WRITTEN", tmp_path / "calibration")
    monkeypatch.setattr(command, "CONF_DIR", tmp_path / "conf")
    for folder in ("calibration", "conf/frontend"):
        (tmp_path / folder).mkdir(parents=True)
    return write_vllm_bench(tmp_path / "result.json", real_run())


def real_run(seed: int = 0, rate_rps: float = 8.0) -> MeasuredRun:
    return served(a_server(schedules_ahead=True), requests(count=150, seed=seed, rate_rps=rate_rps), **TRUE)


def test_a_fit_writes_a_calibration_that_replays_with_its_front_end(
    result: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_vllm_bench(result.parent / "other.json", real_run(seed=5, rate_rps=14.0))
    path = "llama3.1_8b_h100"
    assert exit_status(main, f"run={result}", f"judge={other}", f"latency={path}", "out=mine", *SERVER) == 0
    said = capsys.readouterr().out
    assert "memory_bound" in said
    assert "latency=mine/llama3.1_8b_h100_fitted.json frontend.front_s=" in said
    written = json.loads(Path("mine/llama3.1_8b_h100_fitted.json").read_text())
    assert written["kind"] == "fitted"
    assert written["fit"]["calibration"] == path
    assert written["factors"]["memory_bound"] == pytest.approx(1.1, abs=0.02)
    latency = load_calibration("mine/llama3.1_8b_h100_fitted.json")
    assert latency.linear_s("ffn", 16, 1) == pytest.approx(
        1.1 * load_calibration(path).linear_s("ffn", 16, 1), rel=0.02
    )
    report = json.loads(Path("mine/fit.json").read_text())
    assert report["judged"][0]["run"] == str(other)
    fitted = report["judged"][0]["errors"]["fitted"]
    assert abs(fitted["itl_s"]["mean"]["error"]) < 0.03
    assert abs(fitted["ttft_s"]["mean"]["error"]) < 0.10
    assert Path("mine/fit.png").is_file()
    # A second fit on top of the first is refused; judging it is not.
    again = (f"run={result}", "latency=mine/llama3.1_8b_h100_fitted.json", "out=again", *SERVER)
    assert exit_status(main, *again) == 2
    assert "was fitted already" in capsys.readouterr().err
    assert exit_status(main, *again, "free=[]") == 0


def test_the_least_time_of_an_iteration_is_written_and_priced(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    true = {"front_s": 0.009, "host_floor_s": 0.02}
    runs = [
        write_vllm_bench(
            result.parent / f"at_{rate:g}.json",
            served(a_server(schedules_ahead=True), requests(count=count, rate_rps=rate), **true),
        )
        for count, rate in ((60, 1.0), (150, 8.0))
    ]
    keys = ("free=[front_s,memory_bound,host_floor_s]", "latency=llama3.1_8b_h100", "name=eager", "settings=false")
    assert exit_status(main, f"run=[{','.join(map(str, runs))}]", *keys, "out=mine", *SERVER) == 0
    said = capsys.readouterr().out
    assert said.count("iterations seem to have a least time, as on a server without CUDA graphs") == 2
    written = json.loads(Path("mine/eager.json").read_text())
    assert written["host_floor_us"] == pytest.approx(20e3, rel=0.02)
    latency = load_calibration("mine/eager.json")
    alone_s = latency.iteration_s(dense_plan(load_model("llama3.1_8b")), [], 1, 100, 1)
    assert alone_s == pytest.approx(written["host_floor_us"] / 1e6)


def test_by_name_it_writes_the_calibration_and_the_front_end(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = (f"run={result}", "latency=llama3.1_8b_h100", "name=my_server", "settings=false", *SERVER)
    assert exit_status(main, *keys) == 0
    assert "latency=my_server frontend=my_server" in capsys.readouterr().out
    folder = result.parent
    assert json.loads((folder / "calibration" / "my_server.json").read_text())["name"] == "my_server"
    assert "front_s: 0.00" in (folder / "conf" / "frontend" / "my_server.yaml").read_text()
    # A file that hw.fit did not write is not replaced.
    (folder / "calibration" / "my_server.json").write_text("{}")
    assert exit_status(main, *keys) == 2
    assert "is not replaced" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (("run=missing.json",), "missing.json does not exist"),
        ((), "no run to fit"),
        (("run=3",), "run is 3"),
        (("run=result.json", "judge=[3]"), "judge is"),
        (("run=result.json", "free=[speed]"), "free has 'speed'"),
        (("run=result.json", "free=[fixed_s]"), "two rates"),
        (("run=at_once.json", "free=[host_floor_s]"), "(requests per second that were served here: "),
        (("run=[at_once.json,at_once.json]", "free=[fixed_s]"), "two rates"),
        (("run=[single.json,single_fast.json]", "free=[host_floor_s]"), "every answer has a single token"),
        (("run=result.json", "replicas=0"), "replicas is 0"),
        (("run=result.json", "distinct_prompts=0"), "distinct_prompts is 0"),
        (("run=result.json", "engine.prefix_caching=true"), "which prompts repeat"),
        (("run=result.json", "warm_up=140"), "warm_up is 140"),
        (("run=result.json", "out=result.json"), "out is result.json, which is a file"),
        (("run=result.json", "name=a/b"), "name is 'a/b'"),
        (("run=result.json", "unit=min"), "unit is 'min'"),
        (("run=result.json", "side=server"), "side is 'server'"),
        (("run=result.json", "columns={when: t}"), "columns has no 'when'"),
        (("run=result.json", "gpu=l4_24gb", "model=opt_13b"), "no calibration of opt_13b"),
    ],
)
def test_a_wrong_key_is_one_line_and_status_2(
    result: Path, capsys: pytest.CaptureFixture[str], keys: tuple[str, ...], says: str
) -> None:
    at_once = requests(count=60)
    write_vllm_bench(
        result.parent / "at_once.json", served(a_server(), replace(at_once, arrival_s=0.0 * at_once.arrival_s))
    )
    for name, rate in (("single", 1.0), ("single_fast", 4.0)):
        wanted = requests(count=40, rate_rps=rate)
        run = served(a_server(), replace(wanted, produced_tokens=np.ones_like(wanted.produced_tokens)))
        write_vllm_bench(result.parent / f"{name}.json", run)
    assert exit_status(main, *SERVER, *keys) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.strip().splitlines()[-1].startswith("error: ")


def test_a_refused_fit_writes_no_calibration_and_ends_with_1(
    result: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = command.fit_and_judge

    def worse(*arguments: object, **keywords: object) -> object:
        return replace(judge(*arguments, **keywords), nothing=0.0)  # type: ignore[arg-type, type-var]

    monkeypatch.setattr(command, "fit_and_judge", worse)
    keys = (f"run={result}", "latency=llama3.1_8b_h100", "out=mine", "settings=false", *SERVER)
    assert exit_status(main, *keys) == 1
    assert "refused: " in capsys.readouterr().err
    assert [path.name for path in Path("mine").glob("*.json")] == ["fit.json"]


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        (("name=mine", "out=other"), "other/mine.json"),  # someone's file
        (("name=vllm",), "conf/frontend/vllm.yaml"),  # an option that ships
        (("name=fit", "out=other"), "other/fit.json"),  # the report
    ],
)
def test_a_fit_replaces_no_file_of_others(
    result: Path, capsys: pytest.CaptureFixture[str], keys: tuple[str, ...], kept: str
) -> None:
    path = result.parent / kept
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"kind": "measured"}')
    assert exit_status(main, f"run={result}", "latency=llama3.1_8b_h100", "settings=false", *keys, *SERVER) == 2
    assert "set name= to another name" in capsys.readouterr().err
    assert path.read_text() == '{"kind": "measured"}'


def test_a_fit_is_refused_with_what_to_do() -> None:
    """A right description needs no fit; one that is far off needs mending, though its fit beats nothing."""
    fit = Fitted(point=Point(values={}), ranges={}, samples=(), nothing=2.0, fitted=3.0, simulations=1)
    better = replace(fit, fitted=1.0)

    def said(fit: Fitted, ttft: float, gap: float = 0.01, utilization: float | None = 0.5) -> str | None:
        way = {"ttft_s": {"p50": {"error": ttft}}, "tpot_s": {"p50": {"error": gap}}}
        judged = {"run": "result.json", "errors": {"nothing fitted": way, "fitted": way}}
        found = SimpleNamespace(utilization=utilization)
        return command.refusal(fit, [judged], [found], "llama")  # type: ignore[list-item]

    assert "use latency=llama" in str(said(fit, 0.02))
    assert "mend the description" in str(said(fit, -0.3))
    assert said(better, 0.3) is None
    assert said(better, -0.7, utilization=0.95) is None  # TTFT of a full server is waiting
    assert "far off" in str(said(better, 80.0, utilization=1.2))
    for far in (said(better, -0.6), said(better, 160.0, utilization=None), said(better, 0.0, gap=-0.4)):
        assert "far off" in str(far)


def test_the_fit_of_a_server_with_a_limit_that_is_not_described_is_refused(
    result: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = a_server(schedules_ahead=True, max_running=8)
    write_vllm_bench(result, served(limited, requests(count=150, rate_rps=8.0), noise=0.0, **TRUE))
    keys = (f"run={result}", "latency=llama3.1_8b_h100", "out=mine", "settings=false", *SERVER)
    assert exit_status(main, *keys) == 1
    said = capsys.readouterr()
    assert "mend the description" in said.err
    assert "max_num_seqs" in said.out
    assert [path.name for path in Path("mine").glob("*.json")] == ["fit.json"]
    assert json.loads(Path("mine/fit.json").read_text())["fit"]["accepted"] is False


def test_the_keys_are_those_of_the_schema() -> None:
    assert settings.FitConfig.__doc__ is not None
    for name in settings.FitConfig.__dataclass_fields__:
        if name != "seed":
            assert name in settings.FitConfig.__doc__, name
