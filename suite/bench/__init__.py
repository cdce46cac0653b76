"""Timings as ratios: the cost of norms, training steps, checkpoints and the engine, each beside a rival.

timings.py      every benchmark by name
layers.py       layers: time and memory
steps.py        training steps, and those of architecture search
machine.py      the allocator
grids.py        the engine, jobs, planning and tables
rivals.py       bare loops that the suite's are compared with
bookkeeping.py  checkpoints and the loop
reading.py      images that are decoded while they are read, per second
page.py         timings as a page of Markdown
timing.py       how two things are timed in one run
"""
