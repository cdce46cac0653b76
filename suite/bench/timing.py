"""Contestants timed in one process and in turn, so that a noisy machine moves all alike; or each in a fresh one."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from suite.environment import ALLOCATOR_SWITCH, set_allocator


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


def in_fresh_process(function: Callable[..., Any], *arguments: Any, allocator: str = "resident") -> Any:
    """The result of a call in a new interpreter, in which the allocator is set (or not) before torch is imported."""
    before = os.environ.get(ALLOCATOR_SWITCH)
    os.environ[ALLOCATOR_SWITCH] = allocator
    try:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            return pool.apply(_call, (function, arguments))
    finally:
        if before is None:
            del os.environ[ALLOCATOR_SWITCH]
        else:
            os.environ[ALLOCATOR_SWITCH] = before


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import torch

    set_allocator()
    torch.set_num_threads(1)
    return function(*arguments)
