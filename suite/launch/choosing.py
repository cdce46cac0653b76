"""The launcher for a place (`--on`) and a device (`--device`), and how many runs it makes at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from results.escape import cut
from results.record import RunSpec
from suite.environment import cpu_count
from suite.launch.devices import Devices, check_form, slots_of
from suite.launch.launcher import Launcher
from suite.launch.local import LocalLauncher
from suite.launch.places import Local, Place, Ray
from suite.torchrun import torchrun_place, workers_of


@dataclass(frozen=True)
class Chosen:
    """Where runs are made.

    Args:
        launcher: starts them; None: nothing here does, since an array is submitted.
        jobs: runs at a time; None: as many as a cluster has room for.
        device: of each run: "cuda" where every run is shown accelerators of its own.
    """

    launcher: Launcher[Any] | None
    jobs: int | None
    device: str

    @property
    def at_a_time(self) -> str:
        """`jobs` in words."""
        return "as many at a time as there is room for" if self.jobs is None else f"{self.jobs} at a time"


def choose(
    place: Place,
    device: str,
    jobs: int | None,
    runs_per_device: int | None,
    threads: int,
    runs: Iterable[RunSpec],
) -> Chosen:
    """The launcher of a grid.

    Args:
        place: an array of Slurm is submitted by suite.launch.submissions, and its elements are local.
        device: "cpu"; "cuda": all accelerators, "cuda:0,2": some.
        jobs: runs at a time; None: as many as there is room for.
        runs_per_device: runs that share an accelerator; None: one each.
        threads: of each worker of a run.
        runs: of the plan.

    Raises:
        ValueError: a device that is not here, or too few of them for the workers of a run.
    """
    options = place.options
    if (here := torchrun_place()) is not None:  # each run has all of torchrun's workers, which have their devices
        if place.kind != "local":
            raise ValueError(f"on {place.kind}: torchrun's workers make runs together, where they are; leave --on out")
        runs = list(runs)
        here.check(runs, jobs)
        return Chosen(LocalLauncher(1), 1, device)
    workers = {workers_of(spec) for spec in runs} or {1}
    most = max(workers)
    if isinstance(options, Ray):
        if runs_per_device is not None:
            raise _shared_by_none(runs_per_device, "on ray, gpus=0.5 lets two runs share an accelerator")
        from suite.launch.ray import RayLauncher

        check_form(device)
        if device.startswith("cuda:"):
            raise ValueError(f'device "{cut(device, 40)}": Ray gives each run its accelerators; say --device cuda')
        gpus = options.gpus if options.gpus is not None else float(device == "cuda")
        cpus = options.cpus if options.cpus is not None else threads
        wanted = jobs if jobs is not None else options.jobs
        if 0 < gpus < 1 and most > 1:
            raise ValueError(f"on ray: gpus {gpus:g} of each worker, and a run has {most}; each needs one of its own")
        ray = RayLauncher(
            options.address,
            cpus=cpus,
            gpus=gpus,
            memory=options.memory,
            jobs=wanted,
            data_dir=options.data_dir,
            ship=options.code == "ship",
        )
        return Chosen(ray, wanted, device)
    if not isinstance(options, Local):  # the elements of an array have commands of their own
        check_form(device)
        each = runs_per_device if runs_per_device is not None else getattr(options, "runs_per_device", None)
        if each is not None and not device.startswith("cuda"):
            raise _shared_by_none(each, f"device {cut(device, 40)} has no accelerators")
        return Chosen(None, 1, device)
    slots = slots_of(device)
    jobs = jobs if jobs is not None else options.jobs
    each = runs_per_device if runs_per_device is not None else options.runs_per_device or 1
    if slots is None:
        if runs_per_device is not None:
            raise _shared_by_none(runs_per_device, f"device {cut(device, 40)} has no accelerators")
        if jobs is None:
            jobs = max(1, cpu_count() // (threads * most)) if device == "cpu" else 1
        return Chosen(LocalLauncher(jobs), jobs, device)
    if most > len(slots):
        raise ValueError(
            f'device "{cut(device, 40)}": a run of {most} workers needs as many accelerators, not {len(slots)}'
        )
    devices = Devices(slots, each)
    room = devices.places // min(workers)
    jobs = room if jobs is None else min(jobs, room)
    return Chosen(LocalLauncher(jobs, devices), jobs, "cuda")


def _shared_by_none(given: int, why: str) -> ValueError:
    return ValueError(f"runs-per-device {given}: {why}; --jobs says how many runs go on at a time")
