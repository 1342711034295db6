"""Arrays that Python and compiled code share: everything follows from one declaration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sim.compiled import compiled
from sim.engine.kernel import REPLICA, SchedulingRule, State, fields_of, longer
from sim.engine.kernel.layout import FLOAT64, INT64, Layout, Table
from sim.engine.scheduler import SCHEDULERS

SHOP = Layout()
TILL = np.dtype([("sales", INT64), ("money", FLOAT64)], align=True)
SHELF = np.dtype([("price", FLOAT64), ("items", INT64)], align=True)
till_of = SHOP.record("till", TILL, saved=True)
shelves_of = SHOP.array("shelves", SHELF, rows=lambda sizes: sizes)
shelf_words_of = SHOP.words("shelves")
plan_of = SHOP.array("plan", rows=1, columns=3)


@compiled()
def sell(s: Table, at: int) -> int:
    """Sell one item of a shelf, and copy its record over the first one."""
    till, shelf = till_of(s), shelves_of(s)[at]
    shelf.items -= 1
    till.sales += 1
    till.money += shelf.price
    for word in range(shelf_words_of(s).shape[1]):
        shelf_words_of(s)[0, word] = shelf_words_of(s)[at, word]
    plan_of(s)[0, 2] = at
    return int(shelf.items)


def test_compiled_code_and_python_see_the_same_fields() -> None:
    state = State(SHOP, 3)
    state.shelves["items"], state.shelves["price"] = 4, [1.0, 2.5, 8.0]
    till = fields_of(state.till)
    till.sales = 10
    assert sell(state.table, 1) == 3
    assert (till.sales, till.money) == (11, 2.5)
    assert state.shelves.tolist() == [(2.5, 3), (2.5, 3), (8.0, 4)]
    assert state.plan.tolist() == [[0, 0, 1]]


def test_a_replaced_array_is_found_and_a_snapshot_holds_what_is_declared_saved() -> None:
    state = State(SHOP, 1)
    state.shelves["items"] = 7
    state.replace(shelves=longer(state.shelves, 5))
    assert len(state.shelves) == 5
    assert sell(state.table, 0) == 6
    saved = state.saved()
    assert list(saved) == ["till"]
    sell(state.table, 0)
    assert saved["till"]["sales"][0] == 1


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros(6, dtype=SHELF)[::2], np.zeros(3, dtype=TILL)])
def test_an_array_of_another_kind_is_refused(array: Any) -> None:
    with pytest.raises(TypeError, match=r"shelves is .* needs a contiguous array"):
        State(SHOP, 3, shelves=array)


def test_a_misspelled_field_is_an_error_and_not_a_new_attribute() -> None:
    with pytest.raises(AttributeError):
        fields_of(State(SHOP, 1).till).sale = 1


def test_fields_of_other_sizes_cannot_be_declared() -> None:
    with pytest.raises(TypeError, match="fields of 8 bytes"):
        Layout().array("small", np.int32)


def test_each_scheduler_has_a_rule_in_the_kernel_and_each_field_eight_bytes() -> None:
    assert [rule.name.lower() for rule in SchedulingRule] == list(SCHEDULERS)
    for name, declared in REPLICA.arrays.items():
        for field in declared.dtype.names or ():
            assert declared.dtype[field] in (INT64, FLOAT64), f"{name}.{field}"
