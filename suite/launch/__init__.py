"""Where a run's process is started.

launcher.py        what the engine asks of a place
making.py          the claim to a run, taken by whoever makes it
local.py           a process per run on this machine
process.py         the life of such a process
server.py          the process that forks them
devices.py         accelerators as slots
choosing.py        the launcher of a place and a device
places.py          the value of --on: local, slurm, ray, with what each may be told
slurm.py           an array of Slurm: its batch script
submissions.py     arrays submitted, noted in the folder, found again
slurm_programs.py  sbatch, squeue, scancel: called with limits of time, and what they answer
standing.py        where a folder stands: planned, done, being made, failed, and what Slurm's queue says of it
ray.py             a task per run on a Ray cluster
cluster.py         the connection to it, and the code on its nodes
mailbox.py         what runs there say, on its way
incoming.py        that, written under the claim
far.py             a run on a machine that shares no folder with the command
travelling.py      a Runner as plain values
sets.py            prepared data on its way to the nodes
code.py            the identity of our code on a machine
"""
