"""Adversarial training and robustness inside an L-infinity ball.

task.py        the value TASK, and what is measured after training
options.py     its options
crafting.py    the guard around every attack: the mode, held statistics, and the proof that nothing was changed
pgd.py         FGSM and PGD, and the objective that they climb
trades.py      TRADES: what its crafting climbs, and one update
ensemble.py    the four parts of AutoAttack, by torchattacks
networks.py    from images in [0, 1] to logits
training.py    crafting a batch, one update of each method, the loop
evaluation.py  all attacks on one set of images: the worst case per image, and signs of gradient masking
"""
