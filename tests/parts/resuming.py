"""Runs that are stopped and go on: what an uninterrupted run must equal to the last bit."""

import torch

from tasks.base import RunContext
from tasks.conformance import Stopped, reread
from tasks.journal import Interrupted

TIMED = ("seconds", "step_seconds", "search_seconds", "peak_memory_mb")


def resumed(task, norm, options, stops, folder=None, seed=0, data_dir=None):
    """The outcome of a run that is stopped at each of these places, every part with networks of its own; and how many
    parts there were.

    stops: updates after which it is, or places as tasks.conformance.Stopped has them but ("evaluation", ...).
    """
    stops = [("step", stop) if isinstance(stop, int) else stop for stop in stops]
    state, parts = None, 0
    while True:
        journal = Stopped(state, stops)
        context = RunContext(torch.device("cpu"), seed, data_dir, folder, journal=journal)
        parts += 1
        try:
            return task.run(norm, options, context), parts
        except Interrupted:
            assert journal.stored is not None
            state = reread(journal.stored)


def results(outcome):
    """What must be equal: everything but time and memory."""
    history = [{k: v for k, v in row.items() if k not in TIMED} for row in outcome.history]
    metrics = {k: v for k, v in outcome.metrics.items() if k not in TIMED}
    return metrics, history, outcome.artifacts, outcome.evidence
