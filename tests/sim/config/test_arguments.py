"""Arguments of commands: Hydra's options in any order, and how to write an argument that cannot be read."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from sim.config.arguments import parse_overrides, read_arguments
from sim.errors import ConfigError


def test_options_of_hydra_may_stand_anywhere(tmp_path: Path) -> None:
    found = read_arguments(["trace=burst", "--config-dir", str(tmp_path), "policy=dense,int4", "-m"])
    assert found.overrides == ("trace=burst", "policy=dense,int4")
    assert found.options == ("--config-dir", str(tmp_path), "-m")
    assert (found.multirun, found.config_dir, found.shows) == (True, tmp_path, False)
    assert read_arguments([f"--config-dir={tmp_path}"]).config_dir == tmp_path
    for shown in (["--cfg", "job", "--package", "trace"], ["--cfg=job", "--resolve"], ["--info"], ["--hydra-help"]):
        assert read_arguments(["trace=burst", *shown]).shows
    quiet = read_arguments(["policy=dense", "--quiet", "-m"])
    assert (quiet.quiet, quiet.options, quiet.overrides) == (True, ("-m",), ("policy=dense",))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--bogus"], "there is no option --bogus; a key of the configuration is written bogus=VALUE"),
        (["--seed", "3"], "written seed=3"),
        (["--tick-s=2"], "written tick_s=2"),
        (["--cfg", "nothing"], "choose from"),
        (["--resolve"], "--resolve belongs to --cfg"),
        (["-m", "--cfg", "job"], "exclude each other"),
        (["--run"], "--run is not an option"),
        (["--config-dir", "/not/there"], "--config-dir /not/there: no such folder"),
    ],
)
def test_an_option_that_does_not_exist_or_fit_is_refused_with_the_way_to_write_it(typed: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_arguments(typed)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "path",
    ["a=b.csv", "a (1).csv", "it's.csv", 'the "x".csv', "é.csv", "a,b.csv", "$x{1}.csv", "a;b#c.csv", "a'\"b.csv"],
)
def test_a_path_with_special_characters_is_refused_with_quotes_that_work(path: str) -> None:
    try:
        (override,) = parse_overrides([f"trace.path={path}"], multirun=False)
    except ConfigError as refused:
        quoted = str(refused).partition("for the shell: ")[2] or str(refused).partition("as one value: ")[2]
        (argument,) = shlex.split(quoted)  # what the shell hands over
        (override,) = parse_overrides([argument], multirun=False)
    value = override.value()
    assert getattr(value, "text", value) == path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("burst", "'burst' is not an argument of this command"),
        ("a=b=c", "a: 'b=c' has characters that need quotes"),
        ("a b=c", "has no key before the '='"),
        ("x=[1,2", "not a complete list or mapping"),
        ("x={a: 1", "not a complete list or mapping"),
    ],
)
def test_an_argument_that_cannot_be_read_is_shown_and_explained(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_overrides([text])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_key_typed_like_an_option_with_one_dash_is_refused_with_the_way_to_write_it() -> None:
    with pytest.raises(
        ConfigError, match="there is no option -policy; a key of the configuration is written policy=de"
    ):
        read_arguments(["-policy", "dense"])
    assert read_arguments(["-cn", "replay", "-m", "seed=0,1"]).multirun


def test_a_folder_needs_no_key_even_if_its_name_has_an_equals_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "policy=dense,seed=0"  # as of a sweep with hydra.sweep.subdir='${hydra.job.override_dirname}'
    (tmp_path / "jobs" / name).mkdir(parents=True)
    long = f"out={'x' * 5000}"
    typed = ["plain", "out=report.html", f"jobs/{name}", long]
    found = read_arguments(typed, positional="runs").overrides
    assert found[:2] == ("out=report.html", long)
    assert parse_overrides(found[2:])[0].value() == ["plain", f"jobs/{name}"]
    assert read_arguments(typed).overrides == tuple(typed)
