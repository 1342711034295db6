"""The architecture, read from the code: who may import whom, and which compiled functions Python may call."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from sim.paths import REPOSITORY

FORBIDDEN = {
    "sim": {"hw", "agents", "torch", "transformers", "ray", "gymnasium", "tests"},
    "hw": {"agents", "ray", "gymnasium", "tests"},
    "agents": {"hw", "tests"},
    "conf": {"sim", "hw", "agents", "tests"},
}

# The folders of each package in the order of the data flow. A module may import its own folder and folders of a lower
# layer, never one of its own layer's other folders or of a higher one. "." is the package's own folder.
LAYERS = {
    "sim": (
        (".",),
        ("config",),
        ("traces",),
        ("cost",),
        ("results",),
        ("engine",),
        ("policies",),
        ("cluster",),
        ("disaggregate",),  # its columns of tables are those of clusters
        ("replay",),
        ("serve",),
        ("pages",),
        ("capacity",),
        ("report",),  # reads run folders only
        ("table",),  # reads run folders only
        ("new",),  # writes files only
        ("console",),  # starts commands by their names
    ),
    "hw": (
        (".",),
        ("elastic",),
        ("engine",),
        ("replay",),  # serve and disaggregate start a real engine as hw.replay does
        ("calibrate", "score", "serve", "client", "disaggregate"),
        ("validate",),
        ("fit",),
        ("reproduction",),
        ("checkup",),
        ("loop",),
    ),
    "agents": ((".",), ("envs",), ("baselines",), ("training",), ("evaluation",)),
}

# What only `python -m` and the pages' commands use. They stand above all layers, and no other module imports them.
COMMANDS = {
    "sim.cluster.run",
    "sim.disaggregate.run",
    "sim.capacity.run",
    "hw.reproduction.run",
    "sim.compare",
    "sim.reference",
    "sim.runs",
    "sim.trace",
    "sim.pytest_plugin",  # pytest loads it
    "sim.fit_trace",
    "sim.cluster_results",
    "sim.pages.simulation",
    "sim.pages.clusters",
    "hw.compare",
    "hw.fidelity",
    "hw.disaggregate.results",
    "hw.disaggregate_results",
    "hw.disaggregate.transfer",
    "hw.disaggregate.transfer_page",
    "hw.swap_results",
    "hw.validate.swapping",
    "agents.claim",
    "agents.clone",
    "agents.evaluate",
    "agents.export",
    "agents.offline",
    "agents.knobs",
    "agents.static_plans",
    "agents.train",
    "agents.tune",
    "agents.tune_rules",
    "agents.windows",
}
TOP = 99


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


# --- Layers inside a package -----------------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a syntax tree's nodes without what only a type checker imports."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from runtime_nodes(child)


@cache
def import_graph() -> Mapping[str, frozenset[str]]:
    """Return the modules of the three packages that each of them imports, inside functions too."""
    paths = {module_name(path): path for package in LAYERS for path in (REPOSITORY / package).rglob("*.py")}
    graph = {}
    for name, path in paths.items():
        found = set()
        for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (inside & set(paths)) or {str(node.module)}
        graph[name] = frozenset(found & set(paths) - {name})
    return graph


def layer_of(module: str) -> int:
    if module in COMMANDS or module.endswith(".__main__"):
        return TOP
    package, *rest = module.split(".")
    folders = {folder: layer for layer, names in enumerate(LAYERS[package]) for folder in names}
    return folders[rest[0]] if rest and rest[0] in folders else 0


def is_wrong(module: str, imported: str) -> bool:
    if module.split(".")[0] != imported.split(".")[0]:
        return False  # FORBIDDEN decides
    above, below = layer_of(module), layer_of(imported)
    if above == TOP:
        return False
    return below > above or (below == above and module.split(".")[1:2] != imported.split(".")[1:2] and above > 0)


def test_imports_point_down_the_layers_or_stay_in_one_folder() -> None:
    wrong = {(a, b) for a, names in import_graph().items() for b in names if is_wrong(a, b)}
    assert wrong == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = dict(import_graph())
    while free := [name for name, names in left.items() if not names & set(left)]:
        for name in free:
            del left[name]
    # What is left is in a circle or imports one; go the other way to keep the circles alone.
    while free := [name for name in left if not any(name in names for names in left.values())]:
        for name in free:
            del left[name]
    assert sorted(left) == []


def test_every_folder_has_a_layer() -> None:
    for package, layers in LAYERS.items():
        named = {folder for names in layers for folder in names} - {"."}
        assert {path.parent.name for path in (REPOSITORY / package).glob("*/*.py")} == named


@pytest.mark.parametrize(
    ("module", "imported", "wrong"),
    [
        ("sim.engine.protocol", "sim.policies.base", True),
        ("sim.policies.base", "sim.engine.protocol", False),
        ("sim.engine.protocol", "sim.engine.budget", False),
        ("sim.errors", "sim.traces.trace", True),
        ("hw.serve.server", "hw.score.nll", True),
        ("hw.serve.server", "hw.replay.run", False),
        ("sim.replay.run", "sim.cluster.run", True),
        ("sim.cluster.run", "sim.replay.run", False),
    ],
)
def test_an_arrow_up_or_between_siblings_is_seen(module: str, imported: str, wrong: bool) -> None:
    assert is_wrong(module, imported) == wrong


# --- Compiled functions ----------------------------------------------------------------------------------------------


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
    "sim.engine.kernel.state",
    "sim.engine.kernel.turns",
    "sim.engine.kernel.kv",
    "sim.engine.kernel.prefix_cache",
    "sim.engine.kernel.decodes",
    "sim.engine.kernel.admission",
    "sim.engine.kernel.plans",
    "sim.engine.kernel.loop",
    "sim.cluster.kernel",
    "sim.cluster.migration",
    "sim.cost.latency_tables",
    "sim.cost.streaming",
    "sim.engine.batch_step",
    "agents.envs.serve_vector",
    "tests.sim.engine.test_layout",
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
        "from sim.engine.kernel import kv\nfrom sim.engine.kernel.kv import _take\n_take(1, 2)\nkv._release(1, 2, 3)\n"
    )
    assert private_calls(path) == {"_take", "_release"}
