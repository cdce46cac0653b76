"""Every benchmark by name; the command line prints what it yields.

Each pair is measured in one process and alternating, so that a noisy machine moves both alike. Lines of text come as
soon as they are known. None of this is a test: a ratio that a loaded machine spoils must not fail anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from suite.bench import bookkeeping, grids, layers, machine, reading, rivals, steps

BENCHMARKS: dict[str, Callable[[], Iterator[str]]] = {
    "layers": layers.layers,
    "pairs": layers.pairs,
    "memory": layers.memory,
    "steps": steps.steps,
    "search": steps.search,
    "attacks": rivals.attacks,
    "episodes": rivals.episodes,
    "checkpoints": bookkeeping.checkpoints,
    "loop": bookkeeping.loop,
    "data": reading.data,
    "allocator": machine.allocator,
    "engine": grids.engine,
    "launchers": grids.launchers,
    "jobs": grids.jobs,
    "scale": grids.scale,
}
