"""Adversarial training and robustness inside an L-infinity ball.

task.py        the value TASK, and what is measured after training
options.py     its options
crafting.py    what surrounds every attack: the mode, held statistics, and the proof that nothing was changed
gradient.py    FGSM and PGD, and the objectives that they climb
ensemble.py    the four parts of AutoAttack, by torchattacks
training.py    crafting a batch, one update, the loop
evaluation.py  all attacks on one set of images: the worst case per image, and signs of gradient masking
"""
