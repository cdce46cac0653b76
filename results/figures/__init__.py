"""A frame of runs -> figures, one function each.

drawing.py    a figure as a value, and its files
compact.py    the SVG of a figure in a page, in fewer letters
style.py      the one look of all figures
every.py      all figures that a frame supports, and why others are refused

curves.py     a metric against a numeric option
learning.py   quantities over epochs
cost.py       cost against accuracy, with the Pareto front
domains.py    norms against domains
ranks.py      critical-difference diagram: average ranks, and norms that are not told apart
profiles.py   performance profiles: in how many blocks a norm is near the best
differences.py   paired differences to the reference norm, with intervals and a region of practical equivalence
axes.py       which values share one statistic of a norm: a cube each

asked.py      the task, runs, metric and option that a figure is asked for
words.py      names, n, seeds and holes in words
lines.py      panels of lines: means, bands, seeds, holes
remembered.py    what several figures are made of, made once
complete.py   the blocks in which the same norms have results, over which ranks and profiles compare
labels.py     names beside lines and points, without overlaps
"""
