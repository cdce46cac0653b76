"""Tests on a real Slurm and a real Ray cluster of this machine, and the proof by kills: `make test-cluster`."""
