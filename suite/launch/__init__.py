"""Where a run's process is started, and how its end is heard of.

places.py          the value of --on: local, slurm, ray, with what each may be told
slurm.py           an array of Slurm: its batch script
submissions.py     arrays submitted, noted in the folder, found again
slurm_programs.py  sbatch, squeue, scancel: called with limits of time, and what they answer
standing.py        where a folder stands: planned, done, being made, failed, and what Slurm's queue says of it
"""
