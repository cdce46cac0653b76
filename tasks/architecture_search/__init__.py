"""Architecture search in the DARTS space (Liu et al. 2019, arXiv:1806.09055).

task.py        the value TASK, and what a run measures
options.py     its options
genotype.py    a pair of cells as data: checking, files, random draws, derivation from architecture weights
operations.py  the candidate operations, and their weighted mixture
networks.py    the search network, and the network that a genotype describes
architect.py   the architecture's gradient (first and second order) and one search step
training.py    the two loops: search, and retraining from scratch
drawing.py     a genotype as a picture
"""
