"""The architecture, read from the code: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from sim.paths import REPOSITORY

FORBIDDEN = {
    "sim": {"hw", "agents", "torch", "transformers", "ray", "gymnasium", "tests"},
    "hw": {"agents", "ray", "gymnasium", "tests"},
    "agents": {"hw", "tests"},
    "conf": {"sim", "hw", "agents", "tests"},
}


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_package_imports_what_the_architecture_forbids(package: str) -> None:
    wrong = {
        path.relative_to(REPOSITORY).as_posix(): sorted(found)
        for path in (REPOSITORY / package).rglob("*.py")
        if (found := imported_packages(path) & FORBIDDEN[package])
    }
    assert wrong == {}


def test_the_top_level_holds_the_five_source_folders_and_no_other() -> None:
    folders = {path.parent.name for path in REPOSITORY.glob("*/*.py")}
    assert folders == {"sim", "hw", "agents", "conf", "tests"}


def is_compiled(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        isinstance(by, ast.Call) and isinstance(by.func, ast.Name) and by.func.id == "compiled"
        for by in node.decorator_list
    )


def private_calls(path: Path) -> set[str]:
    """Return the names of private compiled functions that plain Python of this file calls."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {node.name for node in ast.walk(tree) if is_compiled(node)}
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = {alias.asname or alias.name for alias in node.names}
            own |= names if node.module in COMPILED_MODULES else set()
            modules |= {a.asname or a.name for a in node.names if f"{node.module}.{a.name}" in COMPILED_MODULES}
    found = set()

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.Call) and not inside:
            called = node.func
            if isinstance(called, ast.Name) and called.id in own:
                found.add(called.id)
            elif isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                found.update({called.attr} if called.value.id in modules else ())
        for child in ast.iter_child_nodes(node):
            visit(child, inside or is_compiled(child))

    visit(tree, False)
    return {name for name in found if name.startswith("_")}


COMPILED_MODULES = {
    "sim.engine.kernel",
    "sim.cluster.kernel",
    "sim.cost.latency",
    "sim.engine.batch_step",
    "agents.envs.serve_vector",
}


def test_python_calls_no_compiled_function_that_has_no_way_in_from_it() -> None:
    paths = [path for folder in (*FORBIDDEN, "tests") for path in (REPOSITORY / folder).rglob("*.py")]
    compiled = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for path in paths
        if any(is_compiled(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert compiled == COMPILED_MODULES
    assert {path.name: found for path in paths if (found := private_calls(path))} == {}


def test_a_call_from_python_of_a_private_compiled_function_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(
        "from sim.engine import kernel\nfrom sim.engine.kernel import _take\n_take(1, 2)\nkernel._release(1, 2, 3)\n"
    )
    assert private_calls(path) == {"_take", "_release"}
