"""The claims of the loop hold exactly when the utilities say so."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student_t

from hw.loop.verdict import against_best_rule, compared_pairs, judge, levels, noise_of

WINDOWS = ("one", "two")


def repeats(*means: float, spread: float = 0.01) -> np.ndarray:
    """Three repeats around the mean of each window."""
    return np.array([[mean - spread, mean, mean + spread] for mean in means])


def test_the_noise_of_a_difference_is_pooled_over_windows() -> None:
    differences = np.array([[0.1, 0.2, 0.3], [0.5, 0.5, 0.5]])
    of_window, of_all = noise_of(differences)
    deviation = np.sqrt(0.02 / 4)  # the squares of the first window, over W (R - 1)
    assert of_window == pytest.approx(student_t.ppf(0.975, 4) * deviation / np.sqrt(3))
    assert of_all == pytest.approx(of_window / np.sqrt(2))


def test_what_both_policies_share_in_a_repeat_is_no_noise() -> None:
    spell = np.array([[0.0, -0.2, 0.1], [0.1, 0.0, -0.3]])
    noise, _ = noise_of((0.8 + spell) - (0.7 + spell))
    assert noise == pytest.approx(0.0, abs=1e-12)


def test_a_single_repeat_has_no_noise_and_so_no_order_to_keep() -> None:
    rows = compared_pairs(
        {"a": np.array([0.1]), "b": np.array([0.9])}, {"a": np.array([[0.9]]), "b": np.array([[0.1]])}, ["one"]
    )
    assert [row["beyond_noise"] for row in rows] == [False, False]
    assert {row["noise"] for row in rows} == {None}


def test_a_reversed_order_beyond_the_noise_is_found_and_one_within_it_is_not() -> None:
    rng = np.random.default_rng(0)
    real = {name: mean + rng.normal(0, 0.005, (2, 3)) for name, mean in (("a", 0.9), ("b", 0.8), ("c", 0.801))}
    simulated = {"a": np.array([0.7, 0.7]), "b": np.array([0.8, 0.8]), "c": np.array([0.75, 0.75])}
    rows = {(tuple(row["policies"]), row["window"]): row for row in compared_pairs(simulated, real, WINDOWS)}
    assert rows[("a", "b"), None]["agrees"] is False
    assert rows[("a", "b"), "one"]["agrees"] is False
    assert rows[("b", "c"), None]["beyond_noise"] is False
    assert rows[("b", "c"), None]["agrees"] is None


def test_a_tie_in_simulation_is_no_order() -> None:
    real = {"a": repeats(0.9), "b": repeats(0.5, spread=0.02)}
    rows = compared_pairs({"a": np.array([0.7]), "b": np.array([0.7])}, real, ["one"])
    assert [row["agrees"] for row in rows] == [False, False]


def test_a_level_holds_within_the_points_or_within_the_noise_floor_of_its_cell() -> None:
    real = {"calm": repeats(0.8, 0.8), "noisy": repeats(0.8, 0.8, spread=0.2)}
    simulated = {"calm": np.array([0.84, 0.86]), "noisy": np.array([0.95, 1.05])}
    held = {(row["policy"], row["window"]): row["holds"] for row in levels(simulated, real, WINDOWS, 0.05)}
    assert held == {("calm", "one"): True, ("calm", "two"): False, ("noisy", "one"): True, ("noisy", "two"): False}


def test_a_range_holds_the_prediction_and_those_at_other_speeds() -> None:
    real = {"a": repeats(0.50, 0.60), "b": repeats(0.70, 0.80)}
    simulated = {"a": np.array([0.51, 0.60]), "b": np.array([0.60, 0.70])}
    ranges = {"a": [[0.45, 0.52], [0.61, 0.62]], "b": [[0.65, 0.68], [0.79, 0.81]]}
    rows = levels(simulated, real, ["x", "y"], 0.05, ranges)
    assert [(row["least"], row["most"]) for row in rows] == [(0.45, 0.52), (0.60, 0.62), (0.60, 0.68), (0.70, 0.81)]
    assert [row["in_range"] for row in rows] == [True, True, False, True]
    assert all("least" not in row for row in levels(simulated, real, ["x", "y"], 0.05))


@pytest.mark.parametrize(("learned", "verdict"), [(0.9, "above"), (0.801, "not distinguishable"), (0.7, "below")])
def test_the_learned_policy_is_compared_with_the_rule_that_is_best_on_the_real_engine(
    learned: float, verdict: str
) -> None:
    real = {"rule": repeats(0.8, 0.8), "other": repeats(0.5, 0.5), "learned": repeats(learned, learned)[:, ::-1]}
    found = against_best_rule(real, "learned")
    assert (found["best_rule"], found["verdict"], found["holds"]) == ("rule", verdict, verdict != "below")


def test_a_single_repeat_does_not_say_whether_the_learned_policy_is_below_the_best_rule() -> None:
    found = against_best_rule({"rule": np.array([[0.5], [0.6]]), "learned": np.array([[0.8], [0.9]])}, "learned")
    assert (found["verdict"], found["noise"], found["holds"]) == ("unknown", None, False)


@pytest.mark.parametrize(
    ("broken", "simulated", "real", "changes"),
    [
        ("", {}, {}, 25.0),
        ("order", {"rule": 0.84, "learned": 0.835}, {"rule": 0.8, "learned": 0.85}, 25.0),
        ("level", {"learned": 0.97}, {}, 25.0),
        ("learner", {"learned": 0.7}, {"learned": 0.7}, 25.0),
        ("changes", {}, {}, 15.0),
    ],
)
def test_every_claim_must_hold(
    broken: str, simulated: dict[str, float], real: dict[str, float], changes: float
) -> None:
    predicted = {"rule": 0.8, "learned": 0.9} | simulated
    served = {"rule": 0.8, "learned": 0.9} | real
    found = judge(
        {policy: np.array([value, value]) for policy, value in predicted.items()},
        {policy: repeats(value, value) for policy, value in served.items()},
        WINDOWS,
        points=0.05,
        learner="learned",
        changes={"learned": changes},
        least_changes=20.0,
    )
    claims = ("order", "level", "learner", "changes")
    assert [claim for claim in claims if not found[claim]["holds"]] == ([broken] if broken else [])
    assert found["holds"] is not bool(broken)


def test_an_order_that_no_difference_shows_does_not_hold() -> None:
    real = {"a": np.array([[0.5]]), "b": np.array([[0.6]])}
    simulated = {"a": np.array([0.5]), "b": np.array([0.6])}
    found = judge(simulated, real, ["one"], points=0.05, learner=None, changes={}, least_changes=0.0)
    assert found["order"] == {**found["order"], "beyond_noise": 0, "holds": False}
    assert not found["holds"]
