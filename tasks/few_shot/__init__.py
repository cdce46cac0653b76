"""Few-shot learning.

task.py        the value TASK, and what is measured after training
options.py     its options
prototypical.py, imprinting.py, maml.py   one update of each method
networks.py    classifiers on Conv-4 and ResNet-12 (tasks.nets)
episodic.py    forwards of an episode: whose statistics, which norms need the support first; the end of an update
heads.py       from embeddings to logits: prototypes, imprinted weights
training.py    where batches come from, the loop
evaluation.py  the same episodes in the inductive and the transductive way
"""
