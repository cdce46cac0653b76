"""Users' files and what they register, loaded into the process that plans."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def load_plugins(files: Sequence[str | Path] | None) -> tuple[str, ...]:
    """Load the user's files; returns the names of their norms.

    A file that would end this process, or never returns, ends another one first.

    Raises:
        ValueError: files that can not be loaded, one line each.
    """
    if not files:
        return ()
    from norms.registry import load_plugin
    from suite.trial import survives

    names: list[str] = []
    mistakes, here = [], Path.cwd()
    for file in files:
        try:
            if ended := survives(lambda file=file: load_plugin(file)):  # type: ignore[misc]
                mistakes.append(f'plugin "{file}": {ended} while it was imported')
            else:
                names += load_plugin(file)
        except ValueError as error:
            mistakes.append(str(error))
        finally:
            os.chdir(here)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return tuple(dict.fromkeys(names))
