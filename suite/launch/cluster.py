"""The connection to a Ray cluster: made, its nodes asked for their code, ended."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from results.escape import cut, one_line
from suite.environment import cpu_count
from suite.launch import code
from suite.launch.launcher import LaunchError

_MISSING = 'Ray is not installed; `python -m pip install ray` installs it, as does the extra `".[ray]"`'
_CONNECT = 10.0  # seconds for an address to answer
_PROBE = 60.0  # seconds for a node to say which code it has
_RESOURCES = 2.0  # seconds between looks at what the cluster has


def check_installed() -> None:
    """Raises LaunchError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise LaunchError(_MISSING)


class Cluster:
    """A connection, or one that this process had made before, which stays.

    Args:
        address: as ray.init has it; None: the one that RAY_ADDRESS or this machine names, else a new cluster on this
            machine.
        ship: send the code to the nodes, in the place of comparing what is there.

    Raises:
        LaunchError: nobody answers, or a node has other code.
    """

    def __init__(self, address: str | None, ship: bool):
        import ray

        self.address, self.ship = address, ship
        self.code = code.here()
        self._ours = False  # the connection
        self._staged: Path | None = None
        self._nodes: tuple[float, list[Mapping[str, float]]] = (-math.inf, [])
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not ray.is_initialized():
            with _signals_kept():
                self._connect()
            self._ours = True
        try:
            self._compare_code()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        import ray

        if self._ours:
            self._ours = False
            ray.shutdown()
        self._unstage()

    def nodes(self) -> list[Mapping[str, float]]:
        """What each node has in all: CPU, GPU, memory in bytes."""
        import ray

        at, nodes = self._nodes
        if time.monotonic() - at >= _RESOURCES:
            with contextlib.suppress(ray.exceptions.RayError):
                nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self._nodes = (time.monotonic(), nodes)
        return nodes

    def _connect(self) -> None:
        import ray

        with contextlib.suppress(AttributeError):  # else Ray prints the last lines of a log for each node that dies
            ray._private.worker._worker_logs_enabled = False
        address = self.address or os.environ.get("RAY_ADDRESS") or None
        told: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
        if self.ship:
            self._staged = Path(tempfile.mkdtemp(prefix="normsuite-code-"))
            code.copy_to(self._staged)
            told["runtime_env"] = {"working_dir": str(self._staged)}
        if address not in (None, "auto", "local"):
            check_answers(address)
        try:
            try:
                ray.init(address=address or "auto", **told)
            except ConnectionError:
                if address is not None:
                    raise
                ray.init(address="local", num_cpus=cpu_count(), include_dashboard=False, **told)
        except (Exception, SystemExit) as error:  # its own process is asked to end where the cluster does not answer
            self._unstage()
            where = f'Ray at "{cut(address, 80)}"' if address else "Ray"
            raise LaunchError(f"{where}: {why(error)}") from error

    def _compare_code(self) -> None:
        """Raises LaunchError where a node has other code than this command."""
        import ray

        def probe() -> dict[str, str]:  # by its text: the nodes need not have this module
            import platform

            try:
                from suite.launch import code

                return code.here()
            except Exception as error:  # noqa: BLE001 - whatever is there in its place
                return {"host": platform.node(), "trouble": f"{type(error).__name__}: {error}"}

        asked = ray.remote(num_cpus=0, max_retries=0)(probe)
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
        replies = {asked.options(scheduling_strategy=on_node(node["NodeID"])).remote(): node for node in nodes}
        ready, _ = ray.wait(list(replies), num_returns=len(replies), timeout=_PROBE) if replies else ([], [])
        lines = []
        for reply in ready:
            try:
                found = ray.get(reply)
            except Exception as error:  # noqa: BLE001 - a node that went away meanwhile is nobody's mistake
                if not isinstance(error, ray.exceptions.RayTaskError | ray.exceptions.RuntimeEnvSetupError):
                    continue
                found = {"host": replies[reply]["NodeManagerAddress"], "trouble": why(error)}
            if "trouble" in found:
                lines.append(f"node {found['host']} can not import NormSuite ({cut(one_line(found['trouble']), 200)})")
            elif found["fingerprint"] != self.code["fingerprint"]:
                lines.append(f"node {found['host']} has other code: {code.in_words(found)}")
        if lines:
            more = f" (and {len(lines) - 1} more nodes)" if len(lines) > 1 else ""
            raise LaunchError(
                f"{lines[0]}{more}; here it is {code.in_words(self.code)}; give the nodes the same checkout, or send "
                "it with --on ray:code=ship"
            )

    def _unstage(self) -> None:
        if self._staged is not None:
            shutil.rmtree(self._staged, ignore_errors=True)
            self._staged = None


def why(error: BaseException) -> str:
    """Ray's words in one short line: the first one that says something, and its kind."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return why(cause)
    words = " ".join(str(error).split()).split(". ")[0]
    return cut(one_line(f"{type(error).__name__}: {words}" if words else type(error).__name__), 300)


def on_node(node: str) -> Any:
    """Ray's word for a task that runs there and nowhere else."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def check_answers(address: str) -> None:
    """LaunchError where nobody listens: Ray itself tries for minutes, and ends the process then."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise LaunchError(f'Ray at "{cut(address, 80)}": HOST:PORT is needed, such as 10.0.0.1:6379, or auto')
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT).close()
    except OSError as error:
        raise LaunchError(f'Ray at "{cut(address, 80)}": nobody answers ({error.strerror or error})') from error


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself where it connects; ours means to save and to leave."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
