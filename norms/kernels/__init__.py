"""Computations that several layers share: moments, affine maps, and both in few passes over memory.

moments.py   mean and biased variance, per channel or row, and of earlier batches together
affine.py    affine maps of x (N, C, *), by statistics of rows, samples, groups or more than the batch
grouping.py  batch statistics over groups of a flattened sample
blocks.py    how grouping.py reads the memory of an input in units, by torch's kernels
"""
