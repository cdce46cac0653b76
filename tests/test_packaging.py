"""What is installed: the wheel, with and without a C compiler, and an editable install that no mere folder hides."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("suite", "norms", "tasks", "results")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy to build in: a build leaves folders beside the sources. The built-in data is left out."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in (*PACKAGES, "configs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.npz", "_native.*")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    return copy


def built(checkout, call, out, **environment):
    """The wheel that setuptools makes of `checkout`, as pip asks for it without build isolation."""
    code = f"import sys; from setuptools import build_meta; build_meta.{call}"
    command = [sys.executable, "-c", code, str(out)]
    subprocess.run(command, cwd=checkout, env=os.environ | environment, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel)


LIBRARY = f"norms/kernels/_native{EXTENSION_SUFFIXES[0]}"


def test_the_wheel_holds_the_four_packages_their_types_and_the_configs(checkout, tmp_path):
    wheel = built(checkout, "build_wheel(sys.argv[1])", tmp_path)
    names = set(wheel.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
        sources = {file.relative_to(ROOT).as_posix() for file in (ROOT / package).rglob("*.py")}
        assert sources <= names
    assert "norms/kernels/native.c" in names
    assert {f"results/report/page.{kind}" for kind in ("html", "css", "js")} <= names
    for file in (ROOT / "configs").glob("*.yaml"):
        assert wheel.read(f"suite/configs/{file.name}") == file.read_bytes()

    site = tmp_path / "site"
    wheel.extractall(site)
    code = "import suite; from suite.config import CONFIGS; print(CONFIGS); suite.read_config('configs/quick.yaml')"
    environment = os.environ | {"PYTHONPATH": str(site)}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(site / "suite" / "configs")


@pytest.mark.program("gcc")
def test_the_library_is_built_and_needs_nothing_but_torchs_openmp(checkout, tmp_path):
    """A second library of OpenMP would have threads of its own beside those of torch."""
    wheel = built(checkout, "build_wheel(sys.argv[1])", tmp_path)
    library = wheel.extract(LIBRARY, tmp_path)
    code = (
        "import sys; from norms.kernels import native; native.load(sys.argv[1])\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line}))"
    )
    done = subprocess.run([sys.executable, "-c", code, library], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1, done.stdout


def test_without_a_compiler_the_installation_goes_on_without_the_library(checkout, tmp_path):
    shutil.rmtree(checkout / "build", ignore_errors=True)  # where an earlier one would be found
    wheel = built(checkout, "build_wheel(sys.argv[1])", tmp_path, CC="false")
    names = set(wheel.namelist())
    assert LIBRARY not in names
    assert "norms/kernels/native.py" in names


def install_settings():
    """The --config-settings with which the Makefile installs, as setuptools gets them."""
    return dict(re.findall(r"--config-settings (\w+)=(\w+)", (ROOT / "Makefile").read_text(encoding="utf-8")))


def test_a_folder_named_results_beside_a_script_does_not_hide_the_package(checkout, tmp_path):
    """Python takes a folder without __init__.py for a package before it asks import hooks, but after the whole path."""
    wheel = built(checkout, f"build_editable(sys.argv[1], {install_settings()!r})", tmp_path)
    site, user = tmp_path / "site", tmp_path / "user"
    wheel.extractall(site)
    for package in PACKAGES:
        (user / package).mkdir(parents=True)
    found = "*(importlib.util.find_spec(name).origin for name in sys.argv[1:])"
    script = f"import importlib.util, site, sys\nsite.addsitedir({str(site)!r})\nprint({found}, sep='\\n')\n"
    (user / "script.py").write_text(script, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # -S leaves out what is installed here, perhaps another checkout of ours
    command = [sys.executable, "-S", "script.py", *PACKAGES]
    done = subprocess.run(command, cwd=user, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == [str(checkout / package / "__init__.py") for package in PACKAGES]
