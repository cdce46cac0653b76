"""Timings as ratios: the cost of norms, training steps, checkpoints and the engine, each beside a rival.

timings.py      every benchmark by name
rivals.py       bare loops that the suite's are compared with
bookkeeping.py  checkpoints and the loop
timing.py       how two things are timed in one run
"""
