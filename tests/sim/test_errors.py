"""Messages of errors: one line, whatever a file holds."""

from __future__ import annotations

import pickle

import pytest

from sim.cost.model_spec import load_model
from sim.errors import LONGEST_MESSAGE, MOST_NAMES, PlanError, RapLabError, TraceError, nearest, one_line
from sim.policies.fixed import plan_of


def test_a_message_that_quotes_a_long_value_keeps_its_start_and_its_end() -> None:
    message = str(TraceError(f"column 'x' is {'7' * 50_000!r}; allowed are whole numbers"))
    assert len(message) <= LONGEST_MESSAGE
    assert message.startswith("column 'x' is '777")
    assert message.endswith("7'; allowed are whole numbers")


@pytest.mark.parametrize("separator", ["\n", "\r", "\r\n", "\x0b", "\u2028"])
def test_a_message_that_quotes_several_lines_is_one_line(separator: str) -> None:
    assert str(RapLabError(f"found one{separator}  two; write three")) == "found one two; write three"


def test_a_short_message_stays_as_it_is_and_survives_a_process_boundary() -> None:
    assert one_line("two  spaces stay") == "two  spaces stay"
    error = pickle.loads(pickle.dumps(TraceError("a")))
    assert (type(error), str(error)) == (TraceError, "a")


def test_an_option_with_an_endless_name_is_refused_with_a_short_message() -> None:
    with pytest.raises(PlanError, match="has no option") as refused:
        plan_of(load_model("llama2_7b"), {"x" * 70_000: 1})
    assert len(str(refused.value)) <= LONGEST_MESSAGE


def test_the_name_that_a_table_of_plans_gives_to_compressed_kv_leads_to_the_two_of_a_plan() -> None:
    with pytest.raises(PlanError, match="no option 'kv_compression'; give kv_method and kv_percent"):
        plan_of(load_model("llama2_7b"), {"kv_compression": {"method": "ada_kv", "percent": 70}})


def test_of_many_allowed_names_the_closest_are_listed_and_the_others_counted() -> None:
    few = [f"drop {count}" for count in range(MOST_NAMES)]
    assert nearest("drp 3", few).startswith("did you mean 'drop 3'? allowed: drop 0, drop 1, drop 10, ")
    assert nearest("drp 3", few).count(",") == MOST_NAMES - 1
    many = [f"drop {count}, W4 0" for count in range(500)]
    message = nearest("drop 42, W4", many)
    assert message.startswith("did you mean 'drop 42, W4 0'? 500 names are allowed; the closest are: drop 42, W4 0; ")
    assert message.count(";") == 8
    assert nearest("drop 3", ["drop 2, W4 0", "drop 3, W4 0"]).endswith("allowed: drop 2, W4 0; drop 3, W4 0")
    assert "the closest are: " in nearest("?", many), "also for a name that resembles none"
