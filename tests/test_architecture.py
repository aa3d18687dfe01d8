"""Dependencies point one way, modules form no cycle, and light modules import no heavy library.

`protocols <- workers <- asyncflow <- deploy`, and inside asyncflow the floors below. Read from the sources, so that an
import inside a function, or for a type checker, counts as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("protocols", "workers", "asyncflow", "deploy")  # lowest first

# The floors of asyncflow, lowest first: a part imports from lower floors only, for types as well. Parts of one floor do
# not know each other. `asyncflow` itself is the front door, which re-exports.
FLOORS: tuple[set[str], ...] = (
    {"dataflow", "observe"},
    {"services"},
    {"control"},
    {"recipe"},
    {"planner", "client"},
    {"run"},
    {"server"},
    {"demo"},
    {"bench"},
    {"cli"},
)

# Third parties that a package does without.
FORBIDDEN = {
    "workers": {"ray"},
    "asyncflow.dataflow": {"torch", "ray", "vllm", "transformers"},
    "asyncflow.recipe": {"torch", "ray", "vllm", "transformers"},
    "asyncflow.client": {"torch", "ray", "vllm", "transformers"},
    "asyncflow.planner": {"ray", "vllm", "transformers"},
    "asyncflow.observe": {"torch", "ray", "vllm", "transformers"},
    "asyncflow.control": {"torch", "ray", "vllm", "transformers"},
    "asyncflow.server": {"torch", "ray", "vllm", "transformers"},
}


class Import(NamedTuple):
    """One import statement: who imports what, where."""

    importer: str  # dotted module
    imported: str  # dotted module, or module.name
    where: str  # path:line
    loads: bool  # it runs when the importer is imported


def modules() -> dict[str, Path]:
    """Every module of the packages, by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(module: str, source: str, path: Path) -> Iterator[Import]:
    """All imports of a module, those inside functions and for type checkers included."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def walk(node: ast.AST, loads: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            where = f"{path.relative_to(ROOT)}:{getattr(child, 'lineno', 0)}"
            match child:
                case ast.Import(names=names):
                    yield from (Import(module, name.name, where, loads) for name in names)
                case ast.ImportFrom(module=target, names=names, level=level):
                    base = package.rsplit(".", level - 1)[0] if level else ""
                    origin = ".".join(part for part in (base, target) if part)
                    yield from (Import(module, f"{origin}.{name.name}", where, loads) for name in names)
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                    yield from walk(child, loads=False)
                case ast.If(test=test) if "TYPE_CHECKING" in ast.unparse(test):
                    yield from walk(child, loads=False)
                case _:
                    yield from walk(child, loads)

    yield from walk(ast.parse(source, str(path)), loads=True)


IMPORTS = [found for module, path in MODULES.items() for found in imports_of(module, path.read_text(), path)]


def top(module: str) -> str:
    return module.partition(".")[0]


def part_of(module: str) -> str:
    """The part of asyncflow that a module belongs to; "" for the front door."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "asyncflow" and f"{package}.{rest.partition('.')[0]}" in MODULES else ""


def is_settings(name: str) -> bool:
    """A `settings` module of a part, or a name in it."""
    return "settings" in name.split(".")[:3]


def offences(broken: Iterator[Import]) -> list[str]:
    return [f"{found.where} {found.importer} imports {found.imported}" for found in broken]


def module_graph(imports: list[Import], known: set[str]) -> dict[str, set[str]]:
    """Module -> modules that are loaded by loading it. A name imported from a package is its module where it is one."""
    graph: dict[str, set[str]] = {module: set() for module in known}
    for found in imports:
        target = found.imported if found.imported in known else found.imported.rpartition(".")[0]
        if found.loads and target in known and target != found.importer:
            graph[found.importer].add(target)
    return graph


# --- the real packages


def test_the_packages_are_there():
    assert {top(module) for module in MODULES} >= {"protocols", "workers", "asyncflow"}
    assert len(IMPORTS) > len(MODULES)


def test_packages_depend_on_lower_ones_only():
    height = {package: level for level, package in enumerate(PACKAGES)}
    upward = (
        found
        for found in IMPORTS
        if top(found.imported) in height and height[top(found.imported)] > height[top(found.importer)]
    )
    assert offences(upward) == []


def test_no_package_depends_on_the_tests():
    assert offences(found for found in IMPORTS if top(found.imported) == "tests") == []


def test_protocols_need_only_the_standard_library_msgspec_and_numpy():
    allowed = sys.stdlib_module_names | {"protocols", "msgspec", "numpy"}
    foreign = (f for f in IMPORTS if top(f.importer) == "protocols" and top(f.imported) not in allowed)
    assert offences(foreign) == []


@pytest.mark.parametrize("package", FORBIDDEN)
def test_light_packages_do_without_heavy_libraries(package: str):
    heavy = (
        found
        for found in IMPORTS
        if f"{found.importer}.".startswith(f"{package}.") and top(found.imported) in FORBIDDEN[package]
    )
    assert offences(heavy) == []


def test_every_part_of_asyncflow_has_its_floor():
    assert {part_of(module) for module in MODULES if top(module) == "asyncflow"} - {""} == set().union(*FLOORS)


def test_parts_of_asyncflow_depend_on_lower_floors_only():
    floor = {part: height for height, parts in enumerate(FLOORS) for part in parts}
    upward = (
        found
        for found in IMPORTS
        if (importer := part_of(found.importer))
        and (imported := part_of(found.imported))
        and imported != importer
        and floor[imported] >= floor[importer]
    )
    assert offences(upward) == []


def test_settings_are_leaves():
    """They stand beside what they configure, and the recipe is made of them: so they know neither."""
    entangled = (
        found
        for found in IMPORTS
        if is_settings(found.importer)
        and top(found.imported) in PACKAGES
        and top(found.imported) != "protocols"
        and not is_settings(found.imported)
    )
    assert offences(entangled) == []


def test_no_part_enters_by_the_front_door():
    """`asyncflow` re-exports the parts: one that imports it from inside waits for itself."""
    inward = (f for f in IMPORTS if part_of(f.importer) and top(f.imported) == "asyncflow" and not part_of(f.imported))
    assert offences(inward) == []


def test_modules_form_no_cycle():
    try:
        TopologicalSorter(module_graph(IMPORTS, set(MODULES))).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    "module", ["asyncflow", "asyncflow.dataflow.trace", "asyncflow.recipe.config", "asyncflow.recipe.checks"]
)
def test_what_checks_a_recipe_starts_without_the_heavy_libraries(module: str):
    """In a process of its own: what this one has imported already does not count."""
    program = f"import sys, {module}; print(*{{'torch', 'ray', 'vllm', 'transformers'}} & sys.modules.keys())"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


# --- the reader of imports itself: a check that sees nothing would pass for ever


def read(source: str, module: str = "asyncflow.services.stages", file: str = "stages.py") -> list[tuple[str, bool]]:
    return [(found.imported, found.loads) for found in imports_of(module, source, ROOT / file)]


def test_imports_are_found_wherever_they_stand():
    assert read("import a.b") == [("a.b", True)]
    assert read("from a import b, c") == [("a.b", True), ("a.c", True)]
    assert read("try:\n  import a\nexcept ImportError:\n  import b") == [("a", True), ("b", True)]
    assert read("class A:\n  import a") == [("a", True)]
    assert read("def f():\n  import a") == [("a", False)]
    assert read("if TYPE_CHECKING:\n  import a") == [("a", False)]
    assert read("if typing.TYPE_CHECKING:\n  from a import b") == [("a.b", False)]


def test_relative_imports_are_resolved():
    assert read("from . import spec") == [("asyncflow.services.spec", True)]
    assert read("from .spec import Spec") == [("asyncflow.services.spec.Spec", True)]
    assert read("from ..control import ledger") == [("asyncflow.control.ledger", True)]
    assert read("from . import stages", "asyncflow.services", "__init__.py") == [("asyncflow.services.stages", True)]


def test_a_cycle_is_seen_and_a_late_import_is_none():
    def graph(*edges: tuple[str, str, bool]) -> dict[str, set[str]]:
        return module_graph([Import(a, b, "", loads) for a, b, loads in edges], {"x.a", "x.b"})

    assert graph(("x.a", "x.b", True), ("x.b", "x.a.Name", True)) == {"x.a": {"x.b"}, "x.b": {"x.a"}}
    assert graph(("x.a", "x.b.Name", True), ("x.b", "x.a", False)) == {"x.a": {"x.b"}, "x.b": set()}
