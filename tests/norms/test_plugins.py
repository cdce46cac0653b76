"""Plugins: what is executed is what was read, its version is of what it says, and it comes in whole or not at all."""

import ast
import os
import pickle
import sys
import traceback
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tasks
from norms import plugins, registry
from norms.registry import load_plugin, make_norm, norm_info, norm_names, register
from norms.source import LARGEST, parse, read_source, tree_hash

ROOT = Path(registry.__file__).parent

PLUGIN = '''"""A norm of mine."""
import torch
from norms import register

@register(name="mine", source="test", mixes_samples=False, keeps_stats=False)
class Mine(torch.nn.Module):
    """It multiplies."""

    def __init__(self, num_channels, *, rate: float = 2.0, affine: bool = True):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        return x * self.rate
'''

TASK = """
from tasks import register_task
from tasks.base import Options

class Own:
    name, version, options, metrics = "own_task", 7, Options, ("top1",)
    learning_rate = 0.1
    setting = data_checksum = why_not = run = print

register_task(Own())
"""


def version(text):
    return tree_hash(parse(text if isinstance(text, bytes) else text.encode(), "x.py"))


@pytest.fixture
def write(tmp_path):
    def to(text, name="my_norms.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return to


# --- versions ---------------------------------------------------------------------------------------------------------

LAYOUT = {
    "comment": PLUGIN + "# a comment\n",
    "blank lines": PLUGIN.replace("\n", "\n\n"),
    "line ends": PLUGIN.replace("\n", "\r\n"),
    "quotes": PLUGIN.replace('"mine"', "'mine'"),
    "docstrings": PLUGIN.replace('"""It multiplies."""', '"""It multiplies by the rate."""'),
    "no docstring": PLUGIN.replace('"""A norm of mine."""', ""),
    "brackets": PLUGIN.replace("x * self.rate", "(\n x  *self.rate)"),
    "byte order mark": "\ufeff" + PLUGIN,
    "u prefix": PLUGIN.replace('"mine"', 'u"mine"'),
}


@pytest.mark.parametrize("change", LAYOUT)
def test_layout_comments_and_docstrings_are_no_part_of_a_version(change):
    assert LAYOUT[change] != PLUGIN
    assert version(LAYOUT[change]) == version(PLUGIN)


CHANGES = [("2.0", "2"), ("2.0", "2.5"), ("* self", "/ self"), ('"mine"', 'b"mine"'), ("False", "0"), ("x *", "y *")]


@pytest.mark.parametrize(("old", "new"), [*CHANGES, ("return x", "return -x"), ("2.0", "-0.0"), ("affine", "afine")])
def test_what_a_file_does_is_its_version(old, new):
    assert old in PLUGIN
    assert version(PLUGIN.replace(old, new)) != version(PLUGIN)


ODD = r"""
f"a" "b{x!r:>{w}}c" f"{y:}" '\N{BULLET}é\ud800'
z = [1_000, 0x10, 1e999, 1j, True, None, ..., b"\xff", "", f""]
def f(a, /, b=1, *c, d, **e) -> int: "doc"
match x:
    case {"a": 1, **rest}: pass
    case [A(b=2), *_] | None: pass
async def g(): await h(); yield (k := 3)
"""


def test_a_version_is_the_same_in_every_python():
    """Pinned, since this Python can not ask the others; f-strings are cut into parts differently there."""
    assert version(ODD)[:16] == "2e1b2b0d1c9b3dbd"
    assert version("x = f'a{b}' 'c' f'd'") == version("x = f'a{b}cd'")
    assert version("x = f'{a:}' ''") == version("x = f'{a}'")
    assert version("x = 'ab'") == version("x = 'a' 'b'") != version("x = f'ab'")


@pytest.mark.parametrize("file", sorted(ROOT.glob("*.py")), ids=lambda file: file.stem)
def test_a_file_that_is_written_anew_from_its_tree_has_its_version(file):
    tree = ast.parse(file.read_bytes())
    assert version(ast.unparse(tree)) == version(file.read_bytes()) == tree_hash(tree)


def test_no_name_or_constant_of_a_file_can_change_without_its_version():
    text = PLUGIN + TASK + ODD
    fields = {ast.Name: "id", ast.Constant: "value", ast.arg: "arg", ast.Attribute: "attr", ast.alias: "name"}
    hashes = [version(text)]
    for number, node in enumerate(ast.walk(parse(text.encode(), "x.py"))):
        if type(node) in fields:
            tree = parse(text.encode(), "x.py")
            node = list(ast.walk(tree))[number]
            setattr(node, fields[type(node)], "another")
            hashes.append(tree_hash(tree))
    standing = 3  # docstrings
    assert len(hashes) > 60
    assert hashes.count(hashes[0]) == 1 + standing
    assert len(set(hashes)) == len(hashes) - standing


def test_deep_trees_have_a_version():
    assert version("x = " + "-" * 80 + "1") != version("x = " + "-" * 79 + "1")
    assert version("x = " + " + ".join("1" * 900))


# --- files beside -----------------------------------------------------------------------------------------------------

SPLIT = PLUGIN.replace("import torch\n", "import torch\nfrom my_rates import RATE\n").replace("2.0", "RATE")


def test_a_file_beside_that_a_plugin_imports_is_part_of_it(write):
    file, other = write(SPLIT), write("RATE = 2.0\n", "my_rates.py")
    load_plugin(file)
    first = norm_info("mine").version
    assert make_norm("mine").options["rate"] == 2
    other.write_text("RATE = 2.0  # of the paper\n")
    load_plugin(file)
    assert norm_info("mine").version == first
    other.write_text("RATE = 3.0\n")
    load_plugin(file)
    assert norm_info("mine").version != first
    assert make_norm("mine").options["rate"] == 3


@pytest.mark.parametrize(
    ("statement", "files"),
    [
        ("import pieces.rates", ["pieces", "pieces.rates"]),
        ("from pieces import rates", ["pieces", "pieces.rates"]),
        ("from pieces.rates import RATE", ["pieces", "pieces.rates"]),
        ("def f():\n    import pieces.inner.deep", ["pieces", "pieces.inner", "pieces.inner.deep", "pieces.rates"]),
        ("import torch, json, norms, tasks.base", []),
        ("import missing_here", []),
    ],
)
def test_packages_beside_are_followed_and_what_is_installed_is_not(write, statement, files):
    write("", "pieces/__init__.py")
    write("RATE = 1\n", "pieces/rates.py")
    write("", "pieces/inner/__init__.py")
    write("from ..rates import RATE\nfrom . import nothing\n", "pieces/inner/deep.py")
    write("", "json.py")
    write("", "torch.py")
    assert sorted(read_source(write(statement, "own.py")).beside) == files


def test_a_later_import_gives_the_text_that_was_read(write, monkeypatch):
    late = PLUGIN.replace("return x * self.rate", "from my_late import RATE; return x * RATE")
    file, other = write(late), write("RATE = 5\n", "my_late.py")
    monkeypatch.syspath_prepend(str(file.parent))
    load_plugin(file)
    other.write_text("RATE = 6\n")
    assert make_norm("mine")(1)(torch.ones(1, 1)).item() == 5


def test_two_files_of_one_name_are_refused(write):
    write("RATE = 2.0\n", "a/my_rates.py")
    load_plugin(write(SPLIT, "a/own.py"))
    write("RATE = 2.0\n", "b/my_rates.py")
    with pytest.raises(ValueError, match=r'imports "my_rates" from its folder, and another module has this name'):
        load_plugin(write(SPLIT.replace('"mine"', '"other"'), "b/own.py"))
    assert "other" not in norm_names()
    assert make_norm("mine").options["rate"] == 2


def test_a_failing_file_beside_leaves_everything_as_it_was(write):
    file, other = write(SPLIT), write("RATE = 2.0\n", "my_rates.py")
    load_plugin(file)
    module = sys.modules["my_rates"]
    other.write_text("RATE = 3.0\nraise RuntimeError('half')\n")
    with pytest.raises(ValueError, match="RuntimeError: half"):
        load_plugin(file)
    assert sys.modules["my_rates"] is module
    assert make_norm("mine").options["rate"] == 2


# --- what runs --------------------------------------------------------------------------------------------------------


def test_a_plugin_finds_data_beside_itself_and_its_errors_show_the_text_that_runs(write):
    write("4.5", "rate.txt")
    text = PLUGIN.replace("2.0", "float((Path(__file__).parent / 'rate.txt').read_text())")
    text = text.replace("return x * self.rate", "raise KeyError('of the text that runs')")
    file = write("from pathlib import Path\n" + text)
    load_plugin(file)
    assert make_norm("mine").options["rate"] == 4.5
    file.write_text("# another line\n" * 40 + text)
    try:
        make_norm("mine")(1)(None)
    except KeyError as error:
        shown = "".join(traceback.format_exception(error))
    assert f'File "{file}"' in shown
    assert "raise KeyError('of the text that runs')" in shown


def test_a_plugin_travels_to_another_process_and_is_loaded_when_a_name_of_it_is_asked_for(write):
    file = write(PLUGIN + TASK)
    load_plugin(file)
    sent = pickle.dumps(plugins.loaded(file))
    first = norm_info("mine").version
    file.unlink()
    for name in [name for name in sys.modules if name.startswith("normsuite_plugin_")]:
        del sys.modules[name]
    del registry._REGISTRY["mine"], tasks._TASKS["own_task"]  # as in a process that has not loaded it
    plugins.offer([pickle.loads(sent)])  # noqa: S301 - our own bytes
    assert plugins.loaded_here() == {}
    assert "mine" not in norm_names()
    assert tasks.get_task("own_task").learning_rate == 0.1
    assert plugins.loaded_here() == {"my_norms": first}
    assert norm_info("mine").version == tasks.task_version("own_task") == first
    with pytest.raises(ValueError, match='unknown norm "mine2"'):
        norm_info("mine2")


def test_a_task_has_its_plugins_version_and_is_replaced_by_an_edit(write):
    file = write(TASK)
    assert load_plugin(file) == []
    first = tasks.task_version("own_task")
    assert first == plugins.plugin_of("task", "own_task").version != "7"
    assert tasks.task_version("classification") == str(tasks.get_task("classification").version)
    file.write_text(TASK.replace("0.1", "0.2"))
    load_plugin(file)
    assert tasks.task_version("own_task") != first
    assert tasks.get_task("own_task").learning_rate == 0.2
    file.write_text(TASK.replace("0.1", "0.3") + "raise RuntimeError('late')")
    with pytest.raises(ValueError, match="RuntimeError: late"):
        load_plugin(file)
    assert tasks.get_task("own_task").learning_rate == 0.2
    file.write_text("")
    load_plugin(file)
    assert "own_task" not in tasks.task_names()
    with pytest.raises(ValueError, match='"classification" is already registered'):
        load_plugin(write(TASK.replace("own_task", "classification"), "taken.py"))


NAMED = {"source": "test", "mixes_samples": False, "keeps_stats": False}


def test_a_class_is_defined_again_with_replace_and_no_plugins_or_the_suites_is(write):
    class Mine(torch.nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()

    class Again(Mine):
        pass

    register(name="celled", **NAMED)(Mine)
    with pytest.raises(ValueError, match=r'"celled" is already registered by .*; replace=True replaces it$'):
        register(name="celled", **NAMED)(Again)
    register(name="celled", replace=True, **NAMED)(Again)
    assert type(make_norm("celled")(4)) is Again
    load_plugin(write(PLUGIN))
    for name in ("mine", "bn"):
        with pytest.raises(ValueError, match=rf'"{name}" is already registered by .*choose another name$'):
            register(name=name, replace=True, **NAMED)(Again)
    taken = write(PLUGIN.replace('"mine"', '"mine", replace=True'), "other.py")
    with pytest.raises(ValueError, match='"mine" is already registered by'):
        load_plugin(taken)
    assert make_norm("mine").options["rate"] == 2


def test_a_watched_registrys_names_are_the_plugins_and_what_it_covered_comes_back(write, monkeypatch):
    shelf = {"ours": 1}
    monkeypatch.setattr(plugins, "_WATCHED", {})
    monkeypatch.setattr(plugins, "_REGISTRIES", dict(plugins._REGISTRIES))
    plugins.watch("thing", lambda: shelf)
    monkeypatch.setattr(sys, "shelf_of_the_test", shelf, raising=False)
    put = "import sys\nsys.shelf_of_the_test.update(ours={}, mine={})\n"
    file = write(put.format(2, 3))
    load_plugin(file)
    assert plugins.registered_by(file) == (("thing", "ours"), ("thing", "mine"))
    file.write_text(put.format(4, 5) + "raise KeyError")
    with pytest.raises(ValueError, match="KeyError"):
        load_plugin(file)
    assert shelf == {"ours": 2, "mine": 3}
    file.write_text("x = 1\n")
    load_plugin(file)
    assert shelf == {"ours": 1}


# --- files as they are ------------------------------------------------------------------------------------------------


def _fifo(file):
    os.mkfifo(file)


def _loop(file):
    file.symlink_to(file.name)


FILES = {
    "not UTF-8": (lambda file: file.write_bytes(b"x = '\xff'\n"), "SyntaxError"),
    "null bytes": (lambda file: file.write_bytes(b"x = 1\0\n"), "null bytes"),
    "unknown coding": (lambda file: file.write_bytes(b"# coding: nowhere\n"), "unknown encoding"),
    "syntax": (lambda file: file.write_text("x = 1\ndef f(:\n"), "SyntaxError in line 2"),
    "nested": (lambda file: file.write_text("x = " + "(" * 5000 + ")" * 5000), "nested"),
    "long chain": (lambda file: file.write_text("x = " + "-" * 200_000 + "1"), "plugin"),
    "huge": (lambda file: file.write_bytes(b"#" * (LARGEST + 1)), "larger than 1 MiB"),
    "folder": (Path.mkdir, "not a regular file|Is a directory"),
    "pipe": (_fifo, "not a regular file"),
    "link to itself": (_loop, "links|Too many levels|no such file"),
    "device": (lambda file: file.symlink_to("/dev/zero"), "not a regular file"),
    "missing": (lambda file: None, "no such file"),
    "long error": (lambda file: file.write_text("raise ValueError('no ' * 10_000)"), r"ValueError: no .*\.\.\."),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_plugin_is_named_in_one_line(tmp_path, kind):
    make, said = FILES[kind]
    file = tmp_path / "odd.py"
    make(file)
    with pytest.raises(ValueError, match=said) as caught:
        load_plugin(file)
    text = str(caught.value)
    assert text.startswith(f'plugin "{file}": ')
    assert "\n" not in text
    assert len(text) < 600


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="replace")))
def test_whatever_bytes_a_file_has_it_is_python_or_a_value_error(content):
    said = ""
    try:
        version(content)
    except ValueError as error:
        said = str(error)
    assert said == "" or said.startswith('plugin "x.py": ')
    assert "\n" not in said
