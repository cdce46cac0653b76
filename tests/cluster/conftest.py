"""Leaves out the tests of a cluster that can not be started here, and says so in the session's head."""

import importlib.util
import os
import shutil

import pytest


def _missing() -> dict[str, str]:
    """Cluster -> why it can not be started here."""
    found = {}
    if importlib.util.find_spec("ray") is None:
        found["ray"] = "it is not installed (python -m pip install '.[ray]')"
    if os.geteuid() != 0:
        found["slurm"] = "only root can start one"
    elif shutil.which("slurmctld") is None or shutil.which("munged") is None:
        found["slurm"] = "it is not installed (apt-get install slurm-wlm munge)"
    return found


def pytest_report_header() -> list[str]:
    return [f"without {name}: {why}; its tests are left out" for name, why in _missing().items()]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of this folder; a test is of a cluster by its file, or by its parameter."""
    missing = _missing()

    def lacks(item: pytest.Item) -> bool:
        return any(item.path.name == f"test_{name}.py" or f"[{name}]" in item.name for name in missing)

    left_out = [item for item in items if item.path.parent.name == "cluster" and lacks(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
