"""A run that says which accelerators its process is shown, and when it went on: for tests of slots without any."""

import os
import time

from results.record import RunRecord


def look_around(spec, folder, report):
    began = time.monotonic()
    time.sleep(0.15)
    return RunRecord(
        spec=spec,
        status="ok",
        metrics={"began": began, "ended": time.monotonic()},
        evidence={"shown": os.environ.get("CUDA_VISIBLE_DEVICES", "none")},
    )
