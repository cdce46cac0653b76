"""A launcher without processes: each start of a run does what it is told, in the test's own process, so that claims,
waiting and lost machines can be had in milliseconds.

What a start may do:
    ok        take the claim, store a record, end
    twice     the same, and say everything twice
    silent    the same, and lose all messages but the last
    dies      take the claim, and be lost with its machine
    late      store a record, and be lost with its machine before anyone hears of it
    hangs     take the claim and say nothing, until it is killed
    stays     store a record and never end, until it is killed
    taken     find its claim taken over (exit code LOST)
"""

import signal
import time
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from results.record import RunRecord
from results.store import write_record
from suite.launch.launcher import LOST
from suite.launch.making import take

GONE = "its node is gone"


@dataclass(eq=False)
class FakeRun:
    spec: object
    does: str
    claim: object = None
    said: list = field(default_factory=list)
    leaving: bool = False


class FakeLauncher:
    """acts: key of a run -> what its starts do, one after the other; then, and else, ok."""

    at_once = True

    def __init__(self, acts=None, jobs=1, on_start=lambda run: None):
        self.acts, self.jobs, self.on_start = {key: [*each] for key, each in (acts or {}).items()}, jobs, on_start
        self.going, self.started, self.closed = [], [], False

    def open(self, run_one, out):
        self.out = out

    def room(self, spec):
        return len(self.going) < self.jobs

    def start(self, spec, before):
        left = self.acts.get(spec.key) or ["ok"]
        run = FakeRun(spec, left.pop(0))
        self.going.append(run)
        self.started.append((spec.key, run.does))
        self.on_start(run)
        run.claim = take(self.out, spec, before, lambda kind, value: run.said.append((kind, value)))
        if run.claim is None:
            run.said.append(("ended", 0))
        elif run.does == "taken":
            run.said.append(("ended", LOST))
        elif run.does == "dies":
            run.said.append(("ended", GONE))
        elif run.does != "hangs":
            write_record(self.out, RunRecord(spec=spec, status="ok", metrics={"top1": 0.5}))
            ends = {"stays": [], "late": [("ended", GONE)]}.get(run.does, [("ended", 0)])
            run.said += [("stored", None), *ends] if run.does != "late" else ends
        if run.does == "silent":
            run.said = run.said[-1:]
        if run.does == "twice":
            run.said = [each for each in run.said for _ in range(2)]
        return run

    def news(self, runs, seconds, wake):
        if not any(run.said for run in runs):
            time.sleep(min(seconds, 0.01))
            wait([*wake], 0)
        for run in runs:
            while run.said:
                kind, value = run.said.pop(0)
                if kind == "ended" and run in self.going:
                    self._end(run)
                yield run, kind, value

    def _end(self, run):
        self.going.remove(run)
        if run.claim is not None:
            run.claim.release()

    def leave(self, run):
        self.kill(run)

    def kill(self, run):
        run.said.append(("ended", -signal.SIGKILL))

    def close(self):
        self.closed = True
        for run in [*self.going]:
            self._end(run)
