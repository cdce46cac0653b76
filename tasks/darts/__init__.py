"""The DARTS search space and what the task `architecture_search` does with it (Liu et al. 2019, arXiv:1806.09055).

genotype.py    a pair of cells as data: checking, files, random draws, derivation from architecture weights
operations.py  the candidate operations, and their weighted mixture
networks.py    the search network, and the network that a genotype describes
architect.py   the architecture's gradient (first and second order) and one search step
training.py    the two loops: search, and retraining from scratch
drawing.py     a genotype as a picture
"""
