"""Runs that are stopped and go on: what an uninterrupted run must equal to the last bit."""

import torch

from tasks.base import RunContext
from tasks.journal import Interrupted, Journal

TIMED = ("seconds", "step_seconds", "search_seconds", "peak_memory_mb")


class Stopped(Journal):
    """Told to leave before the update after the given ones (of the whole run), each once; saves into memory."""

    def __init__(self, state, stops):
        self.stored, self.stops = state, stops
        super().__init__(state, save=self.store, steps=0)

    def store(self, state, position):
        self.stored = state

    @property
    def due(self):
        if self.stops and self.steps_done >= self.stops[0]:
            self.stops.pop(0)
            self.leaving = True
        return self.leaving


def resumed(task, norm, options, stops, folder=None, seed=0, data_dir=None):
    """The outcome of a run that is stopped after each of these updates, every part with networks of its own; and how
    many parts there were."""
    state, stops, parts = None, sorted(stops), 0
    while True:
        journal = Stopped(state, stops)
        context = RunContext(torch.device("cpu"), seed, data_dir, folder, journal=journal)
        parts += 1
        try:
            return task.run(norm, options, context), parts
        except Interrupted:
            assert journal.stored is not None
            state = reread(journal.stored)


def reread(state):
    """A state as another process reads it."""
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def results(outcome):
    """What must be equal: everything but time and memory."""
    history = [{k: v for k, v in row.items() if k not in TIMED} for row in outcome.history]
    metrics = {k: v for k, v in outcome.metrics.items() if k not in TIMED}
    return metrics, history, outcome.artifacts, outcome.evidence
