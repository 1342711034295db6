"""The page of configuration keys is made from the code."""

from __future__ import annotations

import pytest

pytest.importorskip("ray", reason="the page lists the keys of all commands: pip install -e '.[dev]'")

from sim.reference import PAGE, commands, descriptions, page


def test_the_committed_page_of_keys_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make reference`"


def test_every_primary_configuration_names_the_command_that_reads_it() -> None:
    assert {"sim.replay", "sim.compare", "hw.replay", "agents.train"} <= set(commands())


def test_what_a_docstring_says_of_arguments_is_found_in_every_form_in_use() -> None:
    docstring = """Do something.

    first: one thing,
        over two lines. second, third: another.
    Args:
        fourth: a third thing: with a colon.
    Raises:
        ValueError: never.
    """
    assert descriptions(docstring, ["first", "second", "third", "fourth", "fifth"]) == {
        "first": "one thing, over two lines.",
        "second": "another.",
        "third": "another.",
        "fourth": "a third thing: with a colon.",
    }
