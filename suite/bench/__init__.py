"""Timings as ratios: what a norm, a step, a checkpoint and the engine cost beside what they are compared with.

timings.py      every benchmark by name
rivals.py       bare loops that the suite's are compared with
bookkeeping.py  checkpoints and the loop
reading.py      images that are decoded while they are read, per second
timing.py       how two things are timed in one run
"""
