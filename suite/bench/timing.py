"""Contestants timed in one process and in turn, so that a noisy machine moves all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def alternate(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():  # warm-up: memory, thread pools, lazy initialization
        call()
        call()
    for _ in range(rounds):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(times: list[float], reference: list[float]) -> float:
    return statistics.median(t / r for t, r in zip(times, reference, strict=True))
