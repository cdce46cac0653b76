"""A name with an underscore is its module's own: no other module of the four packages imports it."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("norms", "tasks", "suite", "results")


def private(name):
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def imported_private_names(text):
    """Private names of our packages that a text of Python imports by `from`, or reads of a module that it imports."""
    tree, modules = ast.parse(text), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            modules |= {alias.asname or alias.name for alias in node.names if alias.name.islower()}
            yield from (f"{node.module}.{a.name}" for a in node.names if private(f"{node.module}.{a.name}"))
    for node in ast.walk(tree):
        of_module = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
        if of_module and private(node.attr):
            yield f"{node.value.id}.{node.attr}"


def test_no_module_imports_the_private_name_of_another():
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    found = {str(file.relative_to(ROOT)): [*imported_private_names(file.read_text(encoding="utf-8"))] for file in files}
    found = {file: names for file, names in found.items() if names}
    assert found == {}


def test_the_search_finds_both_ways():
    text = "from norms.layers.bn import _one\nfrom norms import registry\nfrom os import _exit\nregistry._REGISTRY\n"
    assert [*imported_private_names(text)] == ["norms.layers.bn._one", "registry._REGISTRY"]
