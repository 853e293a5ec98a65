"""Tests of the code structure: no import cycles, short import chains, limits on module and class sizes.

`make lint` checks which package may import which (import-linter, in `pyproject.toml`).
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Callable, Mapping
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cvt", "pipeline", "jobs", "configs")
MAX_LEVELS = 9
MAX_MODULE_LINES = 400
MAX_CLASS_LINES = 200

Graph = Mapping[str, set[str]]


@pytest.fixture(scope="module")
def imports() -> Graph:
    """The imports of each module, including imports in functions and for type checking."""
    graph = grimp.build_graph(*PACKAGES)
    return {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}


def grouped(imports: Graph, unit: Callable[[str], str]) -> Graph:
    """Returns the same graph between groups of modules. `unit` returns the group of a module."""
    found: dict[str, set[str]] = {}
    for module, imported in imports.items():
        found.setdefault(unit(module), set()).update(map(unit, imported))
    return {name: imported - {name} for name, imported in found.items()}


def longest_chain(imports: Graph) -> list[str]:
    """Returns the longest chain of imports. Raises `graphlib.CycleError` for a cycle."""
    chains: dict[str, list[str]] = {}
    for name in graphlib.TopologicalSorter(imports).static_order():
        chains[name] = [name, *max((chains[other] for other in imports[name]), key=len, default=[])]
    return max(chains.values(), key=len)


def layer_unit(module: str) -> str:
    """Returns the level of a module: a top-level package, or a package or module in `pipeline`."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "pipeline" else parts[0]


def test_modules_have_no_import_cycle(imports: Graph) -> None:
    assert len(imports) > 100
    longest_chain(imports)


def test_packages_have_few_levels_and_no_cycle(imports: Graph) -> None:
    chain = longest_chain(grouped(imports, layer_unit))
    assert len(chain) <= MAX_LEVELS, " -> ".join(chain)


def test_cycle_is_found() -> None:
    with pytest.raises(graphlib.CycleError):
        longest_chain({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ["a", "b", "c"]


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_modules_are_within_the_size_limit() -> None:
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in sources()}
    long = {name: count for name, count in lines.items() if count > MAX_MODULE_LINES}
    assert not long


def test_classes_are_within_the_size_limit() -> None:
    long = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                count = (node.end_lineno or 0) - node.lineno + 1
                if count > MAX_CLASS_LINES:
                    long[f"{path.relative_to(ROOT).as_posix()}:{node.name}"] = count
    assert long == {}
