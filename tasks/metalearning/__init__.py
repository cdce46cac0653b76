"""What the task `few_shot` is made of.

options.py     its options
networks.py    Conv-4 and ResNet-12 with any norm, and what stands on them
episodic.py    forwards of an episode: whose statistics, which norms need the support first
heads.py       from embeddings to logits: prototypes, imprinted weights
maml.py        MAML on learn2learn, and what the inner loop does to running statistics
training.py    the methods' updates, where their batches come from, the loop
evaluation.py  the same episodes in the inductive and the transductive way
"""
