"""Records -> frame -> tables. Imports neither torch nor any of our other packages.

import results
df = results.load("runs/quick")           # one tidy row per run
df.groupby(["task", "norm_label"])["top1"].mean()
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["load", "load_history"]

# pandas is imported when first needed: every worker imports results.record and none of them makes a table.


def load(folder: str | Path, strict: bool = False, stale: bool = False) -> pd.DataFrame:
    """One tidy row per run below `folder`; see `results.frame.load`."""
    from results import frame

    return frame.load(folder, strict=strict, stale=stale)


def load_history(folder: str | Path, strict: bool = False, stale: bool = False) -> pd.DataFrame:
    """One row per run and epoch below `folder`; see `results.frame.load_history`."""
    from results import frame

    return frame.load_history(folder, strict=strict, stale=stale)
