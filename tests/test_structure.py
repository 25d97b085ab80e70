"""The structure that docs/architecture.md draws: which package may import which, and how long a file may be."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "atlas_jax"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def layers() -> list[str]:
    """The packages and modules of docs/architecture.md from the top layer to the bottom."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `atlas_jax/(\w+)(?:/|\.py)` \|", page, re.MULTILINE)


def layer_of(module: str) -> str:
    """The layer of a module: "training" for "atlas_jax.training.loop"."""
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & MODULES.keys() - {"atlas_jax"}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of an import cycle; empty if there is none."""
    visited: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module not in visited:
            for imported in sorted(graph[module]):
                if found := visit(imported, [*path, module]):
                    return found
            visited.add(module)
        return []

    return next((found for module in graph if (found := visit(module, []))), [])


def test_every_package_has_a_layer():
    """docs/architecture.md lists each package and each module beside the packages, once."""
    listed = layers()
    assert len(listed) == len(set(listed))
    assert set(listed) == {layer_of(module) for module in MODULES if module not in ("atlas_jax", "atlas_jax.__main__")}


def test_imports_point_downwards():
    """No module imports one of a higher layer. The counter-case: in reversed order the same imports are refused."""

    def upward_imports(order: list[str]) -> list[str]:
        return [
            f"{module} imports {imported}"
            for module, path in MODULES.items()
            if module not in ("atlas_jax", "atlas_jax.__main__")
            for imported in sorted(imports(path))
            if order.index(layer_of(imported)) < order.index(layer_of(module))
        ]

    assert upward_imports(layers()) == []
    assert len(upward_imports(layers()[::-1])) > 100


def test_there_is_no_import_cycle():
    """No cycle within a layer either, nor by an import inside a function. The counter-case: a cycle is found."""
    graph = {module: imports(path) for module, path in MODULES.items() if module != "atlas_jax"}
    packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    # `from atlas_jax.mesh.layout import x` runs the package's __init__ too, which is no cycle of names
    graph = {module: {name for name in found if name not in packages} for module, found in graph.items()}
    assert cycle(graph) == []
    assert cycle(graph | {"atlas_jax.errors": {"atlas_jax.config"}}) != []


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_over_400_lines(module):
    """Files are short enough to hold one idea each."""
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 400


def test_only_three_modules_stand_beside_the_packages():
    """All other modules are in a package."""
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "errors.py"}
