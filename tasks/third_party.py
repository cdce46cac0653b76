"""Packages that only some tasks use, unmaintained ones among them: imported where they are used, or a clear error."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

COMMAND = "pip install --no-deps -r requirements-legacy.txt"


def check_installed(package: str, what: str) -> None:
    """ValueError with the command that installs `package` where it is missing; nothing is imported.

    Args:
        package: its import name.
        what: the feature that needs it, as the sentence's subject.
    """
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{what} needs {package}, which is not installed: run `{COMMAND}`")


def import_legacy(package: str, what: str) -> ModuleType:
    """The package `package`. Raises ValueError as `check_installed` does."""
    check_installed(package, what)
    return importlib.import_module(package)
