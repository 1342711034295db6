"""``python -m tests.soak``: breaks the project on purpose, part by part, and writes docs/results/robustness.

inputs       hostile inputs, in slices that are saved; a slice with a fault is played again by the next call
kills        kill -9 at random moments of commands that write files
saturation   hw.serve under more load than it can serve
disk         a full disk at every write of a run
page         the page, from the saved figures
one KIND N   one hostile input again, in this process
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sim.paths import RESULTS

OUT = RESULTS / "robustness"


def main(arguments: Sequence[str]) -> int:
    """Run the part that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    inputs = parts.add_parser("inputs")
    inputs.add_argument("--total", type=int, default=1_000_000)
    inputs.add_argument("--slice", type=int, default=100_000)
    inputs.add_argument("--first", type=int, default=0, help="number of the first input of each kind")
    inputs.add_argument("--kinds", default="", help="some kinds only, separated by commas")
    one = parts.add_parser("one")
    one.add_argument("kind")
    one.add_argument("number", type=int)
    saturation = parts.add_parser("saturation")
    saturation.add_argument("--seconds", type=float, default=7200.0)
    kills = parts.add_parser("kills")
    kills.add_argument("--count", type=int, default=200)
    parts.add_parser("disk")
    parts.add_parser("page")
    for parser_of_part in parts.choices.values():
        parser_of_part.add_argument("--out", type=Path, default=OUT)
        parser_of_part.add_argument("--folder", type=Path, default=Path("runs/soak"), help="for files of the runs")
    return _run(parser.parse_args(arguments))


def _run(chosen: argparse.Namespace) -> int:
    # Each part imports what only it needs: torch alone takes seconds.
    if chosen.part == "one":
        from tests.soak.inputs import one

        for key, value in one(chosen.kind, chosen.number).items():
            print(f"{key}: {value!r}")
        return 0
    if chosen.part == "page":
        from tests.soak.page import write_page

        print(write_page(chosen.out))
        return 0
    return _PARTS[chosen.part](chosen)


def _inputs(chosen: argparse.Namespace) -> int:
    from tests.soak.inputs import SHARES, run

    kinds = chosen.kinds.split(",") if chosen.kinds else list(SHARES)
    content = run(chosen.total, chosen.slice, chosen.out / "inputs.json", kinds=kinds, first=chosen.first)
    return int(any(piece["faults"] for piece in content["slices"].values()))


def _saturation(chosen: argparse.Namespace) -> int:
    from tests.soak.saturation import run

    found = run(chosen.seconds, chosen.folder / "saturation", chosen.out)
    return int(bool(found["server_errors"] or found["tracebacks"] or found["died"] or found["clients_without_end"]))


def _kills(chosen: argparse.Namespace) -> int:
    from tests.soak.kills import run

    return int(bool(run(chosen.count, chosen.folder / "kills", chosen.out / "kills.json")["faults"]))


def _disk(chosen: argparse.Namespace) -> int:
    from tests.soak.disk import run

    return int(bool(run(chosen.folder / "disk", chosen.out / "disk.json")["faults"]))


_PARTS = {"inputs": _inputs, "saturation": _saturation, "kills": _kills, "disk": _disk}
