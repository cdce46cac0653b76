"""One thread per process, set before anything imports torch: the tests then cost the same on every machine.

A test that is skipped has shown nothing, so it fails the session: leave out the case, or test what the machine has.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")


@pytest.fixture(autouse=True)
def registries_as_before() -> Iterator[None]:
    """What a test registers or loads is gone after it: others of the same process go over all norms and tasks."""
    import tasks
    from norms import plugins, registry
    from norms.modules import Beside
    from results import metrics
    from tasks import schedule
    from tasks.data import catalog
    from tasks.nets import models

    registry.norm_names()  # the built-in ones first
    registries = (registry._REGISTRY, tasks._TASKS, models._REGISTERED, schedule._REGISTERED)
    registries += (metrics.METRICS, metrics.RANKS, metrics.VALIDATES, plugins._OF, plugins._UNDER, plugins._offered)
    registries += (catalog._SOURCES, catalog._PLACES)
    befores, modules = [dict(each) for each in registries], set(sys.modules)
    beside = dict(Beside.known)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith("normsuite_plugin_") or name in Beside.known:
            del sys.modules[name]
    Beside.known.clear()
    Beside.known.update(beside)
    for registered, before in zip(registries, befores, strict=True):
        registered.clear()
        registered.update(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Equality to the last bit is promised for a fixed number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


PROGRAMS = ("chromium", "gcc", "pdflatex")
"""What `make tools` installs. Tests that are marked with one of them are left out, and the session's head says so."""


def without_library() -> bool:
    from norms.kernels import native

    return native.kernels() != "native"


def pytest_report_header() -> list[str]:
    missing = [
        f"without {name}: its tests are left out (make tools)" for name in PROGRAMS if shutil.which(name) is None
    ]
    return [*missing, *(["without the compiled kernels: their tests are left out"] if without_library() else [])]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def lacks(item: pytest.Item) -> bool:
        needs_library = item.get_closest_marker("native") is not None
        programs = (mark.args[0] for mark in item.iter_markers("program"))
        return (needs_library and without_library()) or any(shutil.which(name) is None for name in programs)

    left_out = [item for item in items if lacks(item)]
    config.hook.pytest_deselected(items=left_out)
    # Those of the project as a whole first: they take longest, and at the end one core would wait for the other.
    here = Path(__file__).parent
    items[:] = sorted((item for item in items if item not in left_out), key=lambda item: item.path.parent != here)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.stats.get("skipped"):
        terminalreporter.write_line("skipped tests count as failed (tests/conftest.py)", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.exitstatus == 0 and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
