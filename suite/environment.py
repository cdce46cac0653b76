"""Surroundings of a run outside its spec: allocator, threads, kernels, commit, versions, hardware.

None of it is in a run's key; all of it is in its record, so that a table whose cells differ in it can say so.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
import subprocess
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: the folder that holds suite, norms, tasks and results."""

ALLOCATOR_SWITCH = "NORMSUITE_ALLOCATOR"
"""Environment variable; "system" leaves the allocator as it is (used by the benchmark that shows the difference)."""

PLUGIN_GROUP = "normsuite.plugins"
"""The entry points of installed packages whose modules are loaded as plugins (suite.plugins)."""

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_allocator = "system"  # what set_allocator reached; a forked worker inherits it with the memory it describes
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def set_allocator() -> str:
    """Tell glibc to keep freed memory instead of returning large blocks to the system; call before importing torch.

    A large block that comes from mmap is zeroed page by page on every use. Kept blocks are reused as they are, which
    makes large element-wise operations 2 to 4 times faster. The setting survives fork.

    Returns:
        "resident" where it was set, "system" where it was not (other C libraries, or NORMSUITE_ALLOCATOR=system).
    """
    global _allocator
    if os.environ.get(ALLOCATOR_SWITCH) == "system" or platform.libc_ver()[0] != "glibc":
        return _allocator
    mallopt = ctypes.CDLL(None).mallopt
    # The pad is address space asked for ahead, not memory: a page counts only once it is touched.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 1 << 30), (_M_TOP_PAD, 64 << 20))
    if all(mallopt(name, value) for name, value in settings):
        _allocator = "resident"
    return _allocator


def set_threads(threads: int) -> None:
    """Let this process, and what it starts, compute with `threads` threads."""
    export_threads(threads)
    import torch

    torch.set_num_threads(threads)


def export_threads(threads: int) -> None:
    """Set the variables that thread pools of child processes read when they are loaded."""
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))


def cpu_count() -> int:
    """Cores this process may use (not those of the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def commit() -> str:
    """The checkout's commit, with "+changes" where tracked files differ from it; "unknown" without one.

    A copy of the tree inside another repository, or an installation below one, has no commit: that of the other says
    nothing about our code.
    """
    top, head = _git("rev-parse", "--show-toplevel"), _git("rev-parse", "HEAD")
    if not head or not top or Path(top).resolve() != ROOT:
        return "unknown"
    return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def own_version() -> str:
    """NormSuite's version; "" where nothing says it."""
    file = ROOT / "pyproject.toml"
    if file.is_file():  # the metadata of a package may be those of another checkout
        return str(tomllib.loads(file.read_text(encoding="utf-8"))["project"]["version"])
    try:
        return importlib.metadata.version("normsuite")
    except importlib.metadata.PackageNotFoundError:
        return ""


def version_line() -> str:
    """NormSuite, its commit where it is a checkout, Python and torch with their versions; nothing of them is loaded."""
    own = own_version()
    revision = "" if commit() == "unknown" else f" (commit {commit()})"
    return f"NormSuite {own}{revision}, Python {platform.python_version()}, torch {importlib.metadata.version('torch')}"


def now() -> str:
    """The time in UTC, as records store it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def describe(device: str, threads: int, commit: str) -> dict[str, Any]:
    """The `environment` of a record.

    Args:
        device: a torch device, "cpu" or "cuda:0".
        threads: threads per run.
        commit: from `commit()` of the process that planned; asked once per invocation, not once per run.
    """
    import torch

    from norms.kernels.native import kernels

    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else _cpu_model()
    return {
        "commit": commit,
        "python": platform.python_version(),
        **_versions(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "device": where.type,
        "device_name": name,
        "threads": threads,
        # torch's default on recent accelerators: convolutions round their inputs to 10 bits of mantissa
        "tf32": where.type == "cuda" and torch.backends.cudnn.allow_tf32,
        "allocator": _allocator,
        "kernels": kernels() if where.type == "cpu" else "torch",  # those of norms; rounding and costs depend on them
    }


@functools.cache
def _versions() -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in ("torch", "torchvision", "numpy")}


@functools.cache
def _cpu_model() -> str:
    """The processor's name, and what tells processors of one name apart: they round differently, and training amplifies
    that."""
    import torch

    info = Path("/proc/cpuinfo")
    facts: dict[str, str] = {}
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    parts = [f"{name} {facts[name]}" for name in ("cpu family", "model") if facts.get(name)]
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({', '.join([*parts, torch.backends.cpu.get_cpu_capability()])})"


def _git(*arguments: str) -> str:
    # GIT_DIR and its like, set by hooks and by `git rebase --exec`, name another repository; settings may stay.
    around = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith("GIT_CONFIG")}
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=20,
            check=False,
            env=around,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git here: the commit is then recorded as unknown
        return ""
    return done.stdout.removesuffix("\n") if done.returncode == 0 else ""
