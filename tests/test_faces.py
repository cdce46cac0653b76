"""What `import norms`, `results`, `tasks`, `suite` offer: names that resolve, examples that run, no slow import."""

import importlib
import inspect
import itertools
import os
import pydoc
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import norms
from results.record import RunRecord, RunSpec
from results.store import write_record

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("norms", "results", "tasks", "suite")


def python(code, cwd, *arguments):
    """What a fresh interpreter prints for `code`; it finds our packages by PYTHONPATH alone."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", *arguments] + ([] if arguments else ["-c", code])
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def example(package):
    """The lines of the package's docstring that stand before its list of names."""
    lines = importlib.import_module(package).__doc__.split("\n")[2:]
    end = next(i for i, line in enumerate(lines) if line and not line.startswith(" "))
    return textwrap.dedent("\n".join(lines[:end]))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_offered_name_resolves_is_listed_and_stands_in_the_docstring(package):
    module = importlib.import_module(package)
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name).__doc__
        assert name in dir(module)
        assert name in module.__doc__
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing_of_the_kind'"):
        _ = module.nothing_of_the_kind


def test_norms_offers_what_a_user_needs():
    assert set(norms.__all__) == {
        *("make_norm", "register", "load_plugin", "norm_names", "norm_info", "converted", "fuse"),
        *("situation", "hold", "after_update", "predict", "recalibrate"),
    }


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("results", ("torch", "pandas", "numpy", "pydantic", "scipy")),
        ("tasks", ("torch", "pandas", "numpy", "pydantic")),
        ("suite", ("torch", "pandas", "numpy", "pydantic", "typer")),
        ("norms", ("torchvision", "pandas", "scipy", "matplotlib", "timm")),
    ],
)
def test_importing_a_package_does_not_import_what_only_some_of_it_needs(package, absent, tmp_path):
    code = f"import sys, {package}; print(*(name for name in {absent!r} if name in sys.modules))"
    assert python(code, tmp_path).split() == []


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("results.read_record", ("torch", "pandas")),
        ("results.render_all", ("torch",)),
        ("suite.execute", ("torch", "pandas")),
        ("suite.main", ("torch", "pandas")),
    ],
)
def test_a_name_that_is_asked_for_imports_its_own_home_only(name, absent, tmp_path):
    code = f"import sys, {name.split('.')[0]}; {name}; print(*(name for name in {absent!r} if name in sys.modules))"
    assert python(code, tmp_path).split() == []


def test_the_example_of_norms_runs(tmp_path):
    python(example("norms"), tmp_path)


def test_the_example_of_tasks_runs(tmp_path):
    assert 0 <= float(python(example("tasks"), tmp_path).split("\n")[-2]) <= 1


def test_the_example_of_suite_runs(tmp_path):
    (tmp_path / "script.py").write_text(example("suite"), encoding="utf-8")
    out = python("", tmp_path, "script.py")
    assert "gn(num_groups=8)" in out
    assert len([line for line in out.splitlines() if " ok " in line and " top1 " in line]) == 2
    assert re.search(r"[1-9]\d* runs \d+ skipped", out)


def test_the_example_of_results_runs(tmp_path):
    for norm, size in itertools.product(("bn", "gn"), (2, 64)):
        spec = RunSpec(
            task="classification",
            norm=norm,
            norm_options={},
            task_options={"norm_batch_size": size},
            seed=0,
            norm_version="1",
            task_version="1",
            data_checksum="d",
            norm_label=norm,
        )
        record = RunRecord(spec=spec, status="ok", metrics={"top1": 0.5})
        write_record(tmp_path / "runs" / "quick", record)
    out = python(example("results"), tmp_path)
    assert "50.0" in out
    assert r"\begin{tabular}" in out
    assert (tmp_path / "tables" / "all_tables.tex").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_help_of_a_package_shows_its_example_and_documents_its_functions(package):
    module = importlib.import_module(package)
    text = pydoc.plain(pydoc.render_doc(module))
    assert f"import {package}\n" in text
    functions = [name for name in module.__all__ if inspect.isfunction(getattr(module, name))]
    for name in functions:
        assert f"\n    {name}(" in text, name


@pytest.mark.parametrize("module", ["norms.situation", "norms.layers.bn"])
def test_any_module_of_norms_may_be_imported_first(module, tmp_path):
    code = f"import {module}, norms; print(len(norms.norm_names()) > 30, callable(norms.situation))"
    assert python(code, tmp_path).split() == ["True", "True"]


def test_situation_is_a_function_of_the_package_and_a_module_in_it():
    """A submodule is bound to its name in the package, so the two meet."""
    import norms.situation
    from norms.situation import hold, situation

    assert sys.modules["norms.situation"] is norms.situation
    assert norms.situation.situation is situation
    assert norms.situation.hold is hold is norms.hold
    net = norms.make_norm("gn", num_groups=2)(4)
    with norms.situation(net, domain=3, slices=2):
        assert (net.situation.domain, net.situation.slices) == (3, 2)
    assert net.situation.slices == 1
    for slices in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"slices={slices}"), norms.situation(net, slices=slices):
            pass
    with pytest.raises(TypeError, match="slyces"):
        norms.situation(net, slyces=2)


def test_what_replaces_the_function_in_its_module_is_called_through_the_package_too(monkeypatch):
    monkeypatch.setattr("norms.situation.situation", lambda net: f"told {net}")
    assert norms.situation("it") == "told it"


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_are_told_that_the_package_has_types(package):
    assert (ROOT / package / "py.typed").is_file()
