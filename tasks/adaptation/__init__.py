"""Unsupervised domain adaptation: options, networks, losses, the methods' steps, the loop, the selection rules."""
