"""Where a run's process is started.

launcher.py   what the engine asks of a place
making.py     the claim to a run, taken by whoever makes it
local.py      a process per run on this machine
process.py    the life of such a process
server.py     the process that forks them
devices.py    accelerators as slots
"""
