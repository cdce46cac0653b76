"""The map in CONTRIBUTING.md and the headers of packages are the tree: every room is named, every name is a room."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import suite
from norms.layers import LAYERS

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PACKAGES = ("suite", "tasks", "norms", "results")
BELOW = sorted(
    folder.parent.relative_to(ROOT).as_posix()
    for package in PACKAGES
    for folder in (ROOT / package).rglob("__init__.py")
    if folder.parent.name not in PACKAGES
)


def rooms():
    """path -> its line, of the tree in CONTRIBUTING.md."""
    (tree,) = re.findall(r"^```\n(suite/.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    found, package = {}, ""
    for line in filter(None, tree.splitlines()):
        name, _, about = line.strip().partition(" ")
        package = name if not line.startswith(" ") else package
        found[name if name == package else package + name] = about.strip()
    return found


def test_the_tree_names_every_room_and_no_other():
    there = set()
    for package in PACKAGES:
        there.add(f"{package}/")
        for path in (ROOT / package).iterdir():
            if path.suffix == ".py" and path.name != "__init__.py":
                there.add(f"{package}/{path.name}")
            elif (path / "__init__.py").is_file():
                there.add(f"{package}/{path.name}/")
    assert set(rooms()) == there
    assert all(rooms().values())


def test_every_path_of_the_table_of_lines_exists():
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and "`" in line]
    paths = [path for row in rows for path in re.findall(r"`([a-z_]+/[a-z_/]*(?:/|\.py)?)`", row)]
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("package", BELOW)
def test_a_package_s_header_names_each_of_its_modules(package):
    header = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))) or ""
    named = {name for name in re.findall(r"\b[a-z_0-9]+\.py\b", header) if "/" not in name}
    if package == "norms/layers":  # its list stands for the header: it is data, which tables use
        named = {f"{file}.py" for file, _ in LAYERS.values()}
    there = {path.name for path in (ROOT / package).glob("*.py") if path.name != "__init__.py"}
    assert there - named == set()
    assert named - there == set()


def test_the_page_about_python_names_what_suite_offers():
    page = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (call,) = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    assert {word.arg for word in call.keywords} <= set(inspect.signature(suite.run).parameters)
    for name in re.findall(r"`suite\.([A-Za-z]+)", page):
        assert name in suite.__all__


def test_a_module_of_more_than_400_lines_says_why():
    long = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            header = ast.get_docstring(ast.parse(text)) or ""
            if text.count("\n") > 400 and "One module" not in header:
                long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))}")
    assert long == []
