"""Unsupervised domain adaptation.

task.py       the value TASK, and what is measured after training
options.py    its options
dann.py, mcd.py   one update of each method: DANN and CDAN+E, MCD
losses.py     gradient reversal, the domain loss, discrepancy, information
forward.py    how the two domains are forwarded, together or one after the other
networks.py   features, classifiers, discriminator
training.py   the loop
selection.py  the rules that choose an epoch
"""
