"""A file that a user can name ends in one line, whatever it holds: calibrations, quality tables, published points."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sim.cost.latency import CALIBRATIONS, calibration_from_dict, load_calibration
from sim.cost.plan_json import plan_from_json
from sim.cost.quality import QUALITIES, FittedQuality, fitted_path, read_fitted, read_published
from sim.errors import CalibrationError, RapLabError

NOT_JSON = [b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"[1]", b"null", b"{}", b'{"tables": 3}']
WRONG = [None, "x", "", [], {}, [[]], math.nan, math.inf, -1, 0, True, 10**400, 1e308, ["x"], {"a": 1}]


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value of a JSON document; of long lists the first entries only."""
    yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths_of(inner, (*at, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value[:3]):
            yield from paths_of(inner, (*at, index))


def mutated(value: Any, count: int, seed: int) -> Iterator[Any]:
    """Yield copies of a document with one value replaced or removed."""
    rng, places = random.Random(seed), [place for place in paths_of(value) if place]
    for _ in range(count):
        made, place = copy.deepcopy(value), rng.choice(places)
        inner = made
        for key in place[:-1]:
            inner = inner[key]
        if rng.random() < 0.2:
            del inner[place[-1]]
        else:
            inner[place[-1]] = copy.deepcopy(rng.choice(WRONG))
        yield made


def survives(read: Callable[[], object]) -> None:
    """Check that reading either works or raises one line of this project."""
    try:
        read()
    except RapLabError as error:
        message = str(error)
    else:
        return
    assert "\n" not in message
    assert len(message) < 1500


@pytest.mark.parametrize("content", NOT_JSON, ids=range(len(NOT_JSON)))
def test_a_file_that_is_no_json_object_of_its_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "fitted").mkdir()
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    fitted_path(path).write_bytes(content)
    for read in (load_calibration, read_fitted):
        with pytest.raises(CalibrationError) as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_a_calibration_with_any_wrong_value_is_read_or_refused() -> None:
    content = json.loads((CALIBRATIONS / "llama2_7b_h100.json").read_text(encoding="utf-8"))
    for made in mutated(content, 300, seed=1):
        survives(lambda made=made: calibration_from_dict(made, "mine"))  # type: ignore[misc]


def test_an_axis_that_would_fill_the_memory_is_refused() -> None:
    content = json.loads((CALIBRATIONS / "llama2_7b_h100.json").read_text(encoding="utf-8"))
    content["tables"]["tokens"][-1] = 1e15
    with pytest.raises(CalibrationError, match="axis tokens"):
        calibration_from_dict(content)


@pytest.mark.parametrize(("rate", "slowdown"), [(math.inf, 0.1), (1e10, math.inf), (math.nan, 0.1), (0.0, 0.1)])
def test_a_speed_of_copies_that_is_not_finite_is_refused(rate: float, slowdown: float) -> None:
    content = json.loads((CALIBRATIONS / "llama2_7b_h100.json").read_text(encoding="utf-8"))
    content["device_run"] = {"host_to_device_bytes_per_s": rate, "copy_slowdown": slowdown}
    with pytest.raises(CalibrationError, match="all finite"):
        calibration_from_dict(content)


def test_a_curve_over_more_counts_than_can_be_laid_out_is_refused() -> None:
    content = json.loads((CALIBRATIONS / "llama2_7b_h100.json").read_text(encoding="utf-8"))
    content["tables"]["sequences"][-1] = 10**8
    with pytest.raises(CalibrationError, match="a curve may reach"):
        calibration_from_dict(content)


def test_an_endless_duration_is_refused() -> None:
    content = json.loads((CALIBRATIONS / "llama2_7b_h100.json").read_text(encoding="utf-8"))
    with pytest.raises(CalibrationError, match="fixed_us must hold 1 microseconds"):
        calibration_from_dict(content | {"fixed_us": 1e300})


def test_coefficients_with_any_wrong_value_are_read_or_refused(tmp_path: Path) -> None:
    (tmp_path / "fitted").mkdir()
    table = tmp_path / "smollm2_135m.json"
    shutil.copy(QUALITIES / table.name, table)
    content = json.loads(fitted_path(QUALITIES / table.name).read_text(encoding="utf-8"))
    content["fits"] = [fit for fit in content["fits"] if (fit["text"], fit["form"]) == ("test", "warped")]
    for made in mutated(content, 200, seed=2):
        fitted_path(table).write_text(json.dumps(made), encoding="utf-8")
        survives(lambda: read_fitted(table))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("blocks", [0.1]),
        ("root", [math.nan] * 60),
        ("kv", []),
        ("max_loss", -1.0),
        ("dense_nll", math.nan),
        ("pairs", 3),
        ("blocks", [1e308] * 60),
        ("stage_share", 3.0),
        ("dense_nll", 1e5),
    ],
)
def test_coefficients_of_the_wrong_number_or_kind_are_refused(key: str, value: Any) -> None:
    content = json.loads(fitted_path(QUALITIES / "smollm2_135m.json").read_text(encoding="utf-8"))["fits"][0]
    with pytest.raises(ValueError, match=r"must hold|not a finite number|out of range"):
        FittedQuality.from_json("mine", content | {key: value})


PUBLISHED = (QUALITIES / "llama2_7b_published.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "3",
        '"0"',
        "a: [",
        "[" * 5000,
        "\udcff",
        PUBLISHED.replace("9.02", "nan"),
        PUBLISHED.replace("9.02", "0.5"),
        PUBLISHED.replace("9.02", "5.0"),  # below dense
        PUBLISHED.replace("9.02", "1e300"),
        PUBLISHED.replace("9.02", "9" * 400),
        PUBLISHED.replace("[13, 22, 24, 27]", "[13, 99]"),
        PUBLISHED.replace("layers: [0, 1, 2, 4, 8, 16, 32]", "layers: [0, 1, 2, 4, 8, 16, 33]"),
        PUBLISHED.replace("dense_perplexity: 5.472", "dense_perplexity: many"),
        PUBLISHED.replace("[13, 22, 24, 27]", "13"),
        PUBLISHED.replace("[13, 22, 24, 27]", "[x]"),
        PUBLISHED.replace("w4:", "w5:"),
        PUBLISHED.replace("model: llama2_7b", "model: [1]"),
        PUBLISHED.replace("layers: [0, 1, 2, 4, 8, 16, 32]", "layers: [0, 1]"),
    ],
)
def test_published_points_that_are_malformed_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(RapLabError) as caught:
        read_published(path)
    assert "\n" not in str(caught.value)


def test_a_plan_of_a_table_with_any_wrong_value_is_read_or_refused() -> None:
    rows = json.loads((QUALITIES / "smollm2_135m.json").read_text(encoding="utf-8"))["plans"]
    rich = max((row["plan"] for row in rows), key=lambda plan: len(json.dumps(plan)))
    for made in mutated(rich, 300, seed=3):
        survives(lambda made=made: plan_from_json(made))  # type: ignore[misc]
    for layers in (10**12, 0, -1, True, 2.0, "30"):
        with pytest.raises(CalibrationError, match="not a plan"):
            plan_from_json(rich | {"layers": layers})
    with pytest.raises(CalibrationError, match="no layer -1"):
        plan_from_json(rich | {"weight_bits": {"4": [-1]}})
